"""An unquantized model on disk: its configuration, and its weights one tensor at a time."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sliderquant.errors import InputError
from sliderquant.models import family_of
from sliderquant.models.family import Family

__all__ = ["ModelSource", "open_model"]

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelSource:
    """A local folder with a model of a supported family.

    Attributes:
        name: what the user called it: a folder or a hub id.
        config: the transformers configuration.
    """

    name: str
    folder: Path
    config: Any
    family: Family

    @property
    def stored_config(self) -> dict[str, Any]:
        """config.json as it is on disk: what a checkpoint carries over, whatever transformers made of it."""
        stored: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return stored

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        index = self.folder / _INDEX
        if index.exists():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {tensor: self.folder / file for tensor, file in named.items()}
            missing = sorted({file.name for file in files.values() if not file.exists()})
            if missing:
                raise InputError(
                    f"{self.name}: {index.name} names {', '.join(missing)}, which are not in {self.folder}"
                )
            return files
        files = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with _opened(path) as file:
                files.update(dict.fromkeys(file.keys(), path))
        if not files:
            raise InputError(
                f"{self.name}: no *.safetensors in {self.folder}; pickled weights (.bin, .pt) are not read: convert "
                "the model with transformers' save_pretrained first"
            )
        return files

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored. Raises InputError naming the file when it is missing or damaged."""
        if name not in self.files:
            raise InputError(f"{self.name}: tensor {name} is missing from the safetensors files in {self.folder}")
        with _opened(self.files[name]) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise InputError(f"{self.files[name]}: tensor {name} cannot be read: {error}") from error

    def weight(self, name: str, device: torch.device) -> Tensor:
        """The tensor in fp32 on `device`. Raises InputError when it holds values that are not finite."""
        tensor = self.tensor(name).to(device, torch.float32)
        if not tensor.isfinite().all():
            raise InputError(f"{self.name}: tensor {name} holds values that are not finite; the model is damaged")
        return tensor

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Tensor name -> (shape, bytes), from the files' headers alone."""
        found = {}
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    view = file.get_slice(name)
                    shape = tuple(view.get_shape())
                    found[name] = (shape, int(torch.Size(shape).numel()) * _ITEM_BYTES.get(view.get_dtype(), 4))
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights, in which scales are stored."""
        return self.tensor(f"{self.family.layers}.0.{self.family.linears[0]}.weight").dtype

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    def linear_names(self, layer: int) -> tuple[str, ...]:
        """Full names of the linears of a decoder layer that are quantized."""
        return tuple(f"{self.family.layers}.{layer}.{linear}" for linear in self.family.linears)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.name}: its tokenizer cannot be read: {_one_line(error)}") from error


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


def open_model(model: str | Path) -> ModelSource:
    """Find a model in a local folder or on the Hugging Face hub and check that it can be quantized.

    Raises:
        InputError: there is no such model, the hub cannot be reached, it is not a causal language model of a supported
            architecture, or it is quantized already.
    """
    from transformers import AutoConfig

    folder = _local_folder(model)
    if not (folder / "config.json").exists():
        raise InputError(f"{model}: no config.json in {folder}; expected a folder made by save_pretrained, or a hub id")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{model}: config.json cannot be read: {_one_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{model}: is quantized already; expected the original model in 16 bits")
    family = family_of(str(model), config.model_type, config.architectures)
    source = ModelSource(str(model), folder, config, family)
    if source.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"{model}: weights are {source.dtype}; expected float16, bfloat16 or float32")
    return source


def _local_folder(model: str | Path) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_local = isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_local:
        raise InputError(f"{model}: no such folder; expected a local folder with a model, or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise InputError(f"{model}: neither a local folder nor a valid hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{model}: not a local folder, and it could not be had from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or download it first and give its folder"
        ) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}; download the model again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
