"""Which files of a model folder belong to the model: the weights that transformers reads, and what a checkpoint takes
over. Files are chosen by name and read as JSON or safetensors headers: no pickle is opened and no code is run.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sliderquant.errors import InputError

__all__ = [
    "HUB_FILES",
    "StoredTensor",
    "carried_over",
    "found_instead",
    "missing_shards",
    "not_a_file",
    "opened",
    "read_headers",
    "read_json",
    "weight_map",
]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"


def _any_case(pattern: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


_CARRIED_OVER = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "tekken.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    *map(_any_case, ("*license*", "*licence*", "notice*", "copying*", "copyright*", "*use_policy*")),
)
"""What a checkpoint takes over from the folder of the original. Code for the tokenizer is copied, and never run."""

_NEVER_CARRIED = ("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.pkl", "*.ckpt")

HUB_FILES = ("config.json", _WEIGHTS, _INDEX, "model-*.safetensors", _ADAPTER, *_CARRIED_OVER)
"""What is downloaded of a model on the hub: the weights, and all that a checkpoint takes over."""

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}

# What a folder holds in place of weights that are read: patterns, what it is, what to do about it.
_OTHER_WEIGHTS = (
    (
        (_ADAPTER, "adapter_model.*"),
        "a PEFT adapter, not a whole model: merge it into its base model (merge_and_unload) and save the result with "
        "save_pretrained",
    ),
    (("*.gguf",), "GGUF files, which are quantized or converted already: give the folder of the original model"),
    (
        ("consolidated*", "params.json"),
        "weights in their maker's own layout: convert them with the script of transformers, or give the folder with "
        "the Hugging Face version",
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "pytorch_model.bin.index.json"),
        "pickled weights, which could run code and are not read: convert the model with transformers' save_pretrained",
    ),
    (
        ("shard-*-model-*-of-*.safetensors",),
        "a distributed checkpoint: gather it with transformers' from_pretrained and save_pretrained",
    ),
    (
        ("model-*-of-*.safetensors",),
        f"shards without the file {_INDEX}, which says what is in them: copy or download the model again",
    ),
    (
        ("*.safetensors", "*.safetensors.index.json"),
        f"safetensors of other names: rename the right one to {_WEIGHTS}",
    ),
    (("*.h5", "*.msgpack", "*.onnx", "*.npz"), "weights of another framework: give the model in safetensors"),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and its header: its name in the file, dtype as safetensors calls it (`BF16`, ...), shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return int(torch.Size(self.shape).numel()) * _ITEM_BYTES.get(self.dtype, 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file cannot be read or is not a JSON object, or a key in it has two different values.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; repair it, or copy or download the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} is there twice, with different values")
        found[key] = value
    return found


def opened(path: Path) -> Any:
    """The safetensors file. Raises InputError naming it when it is missing, truncated or something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        advice = "fetch it with git lfs pull" if _is_lfs_pointer(path) else "download the model again"
        raise InputError(f"{path}: not a readable safetensors file: {error}; {advice}") from error


def _is_lfs_pointer(path: Path) -> bool:
    """Whether git left a note about the file in the place of the file."""
    try:
        with path.open("rb") as file:
            return file.read(20) == b"version https://git-"
    except OSError:
        return False


def read_headers(name: str, folder: Path, explicit: Any = None) -> dict[str, StoredTensor]:
    """Every tensor of the files that transformers reads: `model.safetensors` where there is one, else the files that
    `model.safetensors.index.json` lists. Anything else in the folder does not count.

    Args:
        name: what the user called the model.
        explicit: a file that config.json asks for in place of these (`transformers_weights`); None: it asks for none.

    Raises:
        InputError: there are no such files, they are damaged, or not what the index says.
    """
    if explicit is not None:
        return _read_explicit(folder, explicit)
    if (folder / _WEIGHTS).is_file():
        return _read_files([folder / _WEIGHTS])
    if (folder / _INDEX).is_file():
        return _read_index(name, folder, _INDEX)
    raise InputError(f"{name}: {_no_weights(folder)}")


def missing_shards(folder: Path) -> list[str]:
    """Files that the index lists, where it counts, and that are not in the folder."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return []
    files = set(weight_map(folder / _INDEX).values())
    return sorted(file for file in files if not (folder / file).is_file())


def _read_explicit(folder: Path, explicit: Any) -> dict[str, StoredTensor]:
    where = f"{folder / 'config.json'}: transformers_weights"
    if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(f"{where} is {explicit!r}, expected a *.safetensors file or its index")
    _check_inside(where, explicit)
    if explicit.endswith(".json"):
        return _read_index(where, folder, explicit)
    return _read_files([folder / explicit])


def _read_index(name: str, folder: Path, index: str) -> dict[str, StoredTensor]:
    listed = weight_map(folder / index)
    files = sorted(set(listed.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{name}: {index} names {', '.join(missing)}, which are not in {folder}: an incomplete copy; copy or "
            "download the model again"
        )
    tensors = _read_files([folder / file for file in files])
    absent = [tensor for tensor in listed if tensor not in tensors]
    if absent:
        raise InputError(
            f"{folder / index}: names tensor {absent[0]} in {listed[absent[0]]}, which does not hold it: index and "
            "files are not of the same model; copy or download it again"
        )
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index.

    Raises:
        InputError: the file cannot be read, has no `weight_map`, or names a file that is not a *.safetensors file in
            the folder.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{index}: has no weight_map; copy or download the model again")
    for tensor, file in listed.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise InputError(f"{index}: tensor {tensor} is in {file!r}, expected the name of a *.safetensors file")
        _check_inside(f"{index}: tensor {tensor}", file)
    return listed


def _check_inside(where: str, file: str) -> None:
    path = PurePosixPath(file.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or Path(file).is_absolute():
        raise InputError(f"{where}: {file!r} is outside of the model's folder, expected a file in it")


def _read_files(paths: list[Path]) -> dict[str, StoredTensor]:
    tensors = {}
    for path in paths:  # a tensor that is in two files is taken from the later one, as transformers does
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118
                view = file.get_slice(key)
                tensors[key] = StoredTensor(path, key, view.get_dtype(), tuple(view.get_shape()))
    return tensors


def _no_weights(folder: Path) -> str:
    """What is in a folder that has no weights which are read, and what to do about it."""
    for name in (_WEIGHTS, _INDEX):
        if trouble := not_a_file(folder / name):
            return trouble
    some = any(path.name.endswith(".safetensors") for path in folder.iterdir())
    expected = f"no {_WEIGHTS} and no {_INDEX} in {folder}" if some else f"no *.safetensors in {folder}"
    found = found_instead(folder)
    return f"{expected}; {found}" if found else f"{expected}: it has no weights; copy or download the model again"


def not_a_file(path: Path) -> str | None:
    """Why what the folder lists as `path` cannot be read as a file; None: it can, or nothing has that name."""
    if path.is_dir():
        return f"{path} is a folder, expected a file"
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which is missing: copy or download the model again"
    return None


def found_instead(folder: Path) -> str | None:
    """What a folder holds that is not a model in the layout of transformers, and what to do; None: nothing known."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        if trouble := next((name for name in names if name.casefold() == "config.json"), None):
            return f"{trouble}: rename it to config.json"
        # The root of a cache of the hub holds snapshots/REVISION/config.json.
        inner = sorted(path.parent for depth in ("*", "snapshots/*") for path in folder.glob(f"{depth}/config.json"))
        if inner:
            return f"a model in {inner[-1].relative_to(folder)}: give {inner[-1]}"
    for patterns, advice in _OTHER_WEIGHTS:
        found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return f"{', '.join(found[:3])}{more}: {advice}"
    return None


def carried_over(folder: Path) -> Iterator[Path]:
    """The files of an original model's folder that a checkpoint takes over, sorted.

    Raises:
        InputError: one of them cannot be read.
    """
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if any(fnmatchcase(name, pattern) for pattern in _NEVER_CARRIED) or path.is_dir():
            continue
        if any(fnmatchcase(name, pattern) for pattern in _CARRIED_OVER):
            if trouble := not_a_file(path):
                raise InputError(f"{trouble}; it belongs into the checkpoint")
            if not path.is_file():
                continue
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} cannot be read, and belongs into the checkpoint: change its permissions")
            yield path
