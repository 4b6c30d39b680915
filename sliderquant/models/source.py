"""An unquantized model on disk: its configuration, and its weights one tensor at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sliderquant.errors import InputError
from sliderquant.models import check_model_type, family_of
from sliderquant.models.family import Family
from sliderquant.models.files import (
    HUB_FILES,
    StoredTensor,
    carried_over,
    found_instead,
    missing_shards,
    not_a_file,
    opened,
    read_headers,
    read_json,
)
from sliderquant.models.layer import LayerSpec, describe_layer
from sliderquant.models.matching import empty_model, matched, warn_once

__all__ = ["ModelSource", "default_seqlen", "open_model", "read_tokenizer"]

_LONGEST_BLOCK = 2048


@dataclass(frozen=True)
class ModelSource:
    """A local folder with a model of a supported family, whose tensors are all there.

    Attributes:
        name: what the user called it: a folder or a hub id.
        config: the transformers configuration; its `tie_word_embeddings` is what the files say, not only config.json.
        tensors: where each tensor of the model class is; the head only when it is not the embedding.
    """

    name: str
    folder: Path
    config: Any
    family: Family
    tensors: Mapping[str, StoredTensor]

    @property
    def stored_config(self) -> dict[str, Any]:
        """config.json as it is on disk: what a checkpoint carries over, whatever transformers made of it. Only a head
        that config.json ties wrongly is not tied any more."""
        stored: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if stored.get("tie_word_embeddings") and not self.config.tie_word_embeddings:
            stored["tie_word_embeddings"] = False
        stored.pop("transformers_weights", None)  # a name of a file that the checkpoint does not have
        return stored

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        return {name: tensor.file for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored. Raises InputError naming the file when it is missing or damaged."""
        stored = self.tensors.get(name)
        if stored is None:
            raise InputError(f"{self.name}: tensor {name} is missing from the safetensors files in {self.folder}")
        with opened(stored.file) as file:
            try:
                return file.get_tensor(stored.key)
            except SafetensorError as error:
                raise InputError(f"{stored.file}: tensor {stored.key} cannot be read: {error}") from error

    def weight(self, name: str, device: torch.device) -> Tensor:
        """The tensor in fp32 on `device`. Raises InputError when it holds values that are not finite."""
        return self._checked(name, self.tensor(name).to(device, torch.float32))

    def check_values(self) -> None:
        """Read every tensor once, before hours of work. Raises InputError when one holds values that are not finite."""
        for name in self.tensors:
            self.finite_tensor(name)

    def finite_tensor(self, name: str) -> Tensor:
        """The tensor as stored. Raises InputError when it holds values that are not finite, and as `tensor`."""
        return self._checked(name, self.tensor(name))

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.isfinite().all():
            raise InputError(
                f"{self.name}: tensor {name} holds values that are not finite; the model is damaged: copy or download "
                "it again"
            )
        return tensor

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Tensor name -> (shape, bytes), from the files' headers alone."""
        return {name: (tensor.shape, tensor.bytes) for name, tensor in self.tensors.items()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the linears' weights, in which scales are stored; where they differ, one that holds all."""
        stored = {self.tensors[f"{name}.weight"].dtype for name in self.linear_names}
        return reduce(torch.promote_types, (_DTYPES[dtype] for dtype in stored))

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def default_seqlen(self) -> int:
        """Tokens of a calibration sample or of a block that perplexity is measured on; see `default_seqlen`."""
        return default_seqlen(self.config)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each decoder layer is made of."""
        return tuple(describe_layer(self.family, self.config, index) for index in range(self.num_layers))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Full names of all linears that are quantized, layer by layer, in the order of the data flow."""
        return tuple(name for layer in self.layers for name in layer.full_linears)

    def shape(self, layer: LayerSpec, linear: str) -> tuple[int, int]:
        """(out, in) of a linear of a layer."""
        out_features, in_features = self.shapes[f"{layer.full(linear)}.weight"][0]
        return out_features, in_features

    def tokenizer(self) -> Any:
        """Of the class that transformers has for it. Raises InputError when there is none, or it needs own code."""
        return read_tokenizer(self.folder, self.name)


def default_seqlen(config: Any) -> int:
    """2048 tokens, or the model's maximum when that is shorter."""
    return min(_LONGEST_BLOCK, int(config.max_position_embeddings))


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPE_NAMES = ("float32", "bfloat16", "float16")


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a model or a checkpoint, of the class that transformers has for it.

    Args:
        name: what the user called it.

    Raises:
        InputError: there is none, it is damaged, or it needs code from the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions at files that it cannot read
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{name}: its tokenizer needs code from the model's folder, which is never run: save one of "
                "transformers' own classes with it, or use --method rtn, which needs none"
            ) from error
        raise InputError(
            f"{name}: its tokenizer cannot be read from {folder}: {_one_line(error)}; copy its files there again"
        ) from error


def open_model(model: str | Path) -> ModelSource:
    """Find a model in a local folder or on the Hugging Face hub and check that it can be quantized: its configuration,
    and from the files' headers that every tensor of the model class is there. Code in the folder is never run.

    Raises:
        InputError: there is no such model, the hub cannot be reached, it is not a causal language model of a supported
            architecture, it is quantized already, or its files are not those of a whole model.
    """
    from transformers import AutoConfig

    folder = _local_folder(model)
    if trouble := not_a_file(folder / "config.json"):
        raise InputError(f"{model}: {trouble}")
    if not (folder / "config.json").is_file():
        found = found_instead(folder)
        hint = f"; it holds {found}" if found else "; expected a folder made by save_pretrained, or a hub id"
        raise InputError(f"{model}: no config.json in {folder}{hint}")
    stored = read_json(folder / "config.json")
    if stored.get("quantization_config") or stored.get("compression_config"):
        raise InputError(f"{model}: is quantized already; expected the original model in 16 bits")
    family_of(str(model), stored.get("model_type"), _architectures(model, stored))
    # transformers would offer to run the folder's own code for a type that it does not know.
    check_model_type(str(model), stored)
    _check_dtype(folder / "config.json", stored)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a model's own validation raises
        raise InputError(f"{model}: config.json cannot be read: {_one_line(error)}") from error
    family = family_of(str(model), config.model_type, None)
    # An implementation of attention that config.json names may be code on the hub.
    config._attn_implementation = None
    config.return_dict = True  # what is stored decides for a loaded model, not for how we call this one
    if int(getattr(config, "num_hidden_layers", 0) or 0) < 1:
        raise InputError(f"{model}: config.json has num_hidden_layers {config.num_hidden_layers}: expected 1 or more")
    skeleton = empty_model(str(model), config)
    found_tensors = read_headers(str(model), folder, getattr(config, "transformers_weights", None))
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    tensors, tied = matched(str(model), skeleton, found_tensors, embedding, head)
    config.tie_word_embeddings = tied
    for _ in carried_over(folder):
        pass  # can all be read
    if (folder / "adapter_config.json").exists():
        warn_once(
            f"{model}: the adapter in {folder} (adapter_config.json) is ignored, and the model without it is "
            "quantized: to have it quantized, merge it first (merge_and_unload) and save the result with "
            "save_pretrained"
        )
    return ModelSource(str(model), folder, config, family, tensors)


def _architectures(model: str | Path, stored: Mapping[str, Any]) -> list[str] | None:
    named = stored.get("architectures")
    if named is None or (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        return named
    raise InputError(f"{model}: config.json has architectures {named!r}: expected a list of names")


def _check_dtype(path: Path, config: Mapping[str, Any]) -> None:
    """The checkpoint carries the field over, and every reader takes the dtype of the model from it."""
    for field in ("dtype", "torch_dtype"):
        value = config.get(field)
        if value is not None and value not in _DTYPE_NAMES:
            raise InputError(
                f"{path}: {field} is {value!r}, expected {', '.join(_DTYPE_NAMES)}: set it to that of the weights"
            )


def _local_folder(model: str | Path) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file; expected the folder of the model, with its config.json")
    looks_local = isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_local:
        raise InputError(f"{model}: no such folder; expected a local folder with a model, or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(model), allow_patterns=list(HUB_FILES)))
        shards = missing_shards(folder)
        if shards:  # of names of their own; of the same revision
            folder = Path(snapshot_download(str(model), revision=folder.name, allow_patterns=shards))
        return folder
    except HFValidationError as error:
        raise InputError(f"{model}: neither a local folder nor a valid hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"{model}: not a local folder, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or download it first and give its folder"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
