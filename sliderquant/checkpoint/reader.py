"""A checkpoint folder, read and checked from its headers: no weight is read.

Reads what sliderquant writes and what other tools write in the formats `pack-quantized` and `int-quantized` of
compressed-tensors.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sliderquant.checkpoint.config import FORMAT_VERSION, SchemeLookup, read_entry
from sliderquant.checkpoint.packing import CODES, INPUT_CLIP, INT8, PACKED, PARTS, stored_shapes
from sliderquant.checkpoint.shards import INDEX_NAME, WEIGHTS_NAME
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.files import weight_map as listed_files
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import Scheme

__all__ = ["REPORT_NAME", "Checkpoint", "StoredTensor", "read_checkpoint"]

logger = logging.getLogger(__name__)

REPORT_NAME = "sliderquant-report.json"

_SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PART_DTYPES = {
    PACKED: {
        "weight_packed": ("I32",),
        "weight_scale": tuple(_SCALE_DTYPES),
        "weight_zero_point": ("I32",),
        "weight_shape": ("I64", "I32"),
        INPUT_CLIP: ("F32",),
    },
    INT8: {"weight": ("I8",), "weight_scale": tuple(_SCALE_DTYPES), "weight_zero_point": ("I8",), INPUT_CLIP: ("F32",)},
}
_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and its header: dtype as safetensors names it (`BF16`, `I32`, ...), shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    value: tuple[int, ...] | None = None  # of a weight_shape, which is as good as a header

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.count * _DTYPE_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        path: the folder.
        config: config.json.
        schemes: the scheme of every quantized linear, by module name, in the order of the names.
        linear_shapes: `(out, in)` of every quantized linear.
        tensors: every tensor of the safetensors files, by name.
        format_version, version: of the sliderquant that wrote it; None when another tool did.
        report: sliderquant-report.json, or None.
        rotations: what the weights were rotated by; None: nothing.
        kv_bits: bits of queries, keys and values; 16: not quantized.
        clipped: whether there is a clipping for the range of every input that is rounded, and with quantized attention
            for those of queries, keys and values.
        lookup: which linears the configuration quantizes.
    """

    path: Path
    config: dict[str, Any]
    schemes: dict[str, Scheme]
    linear_shapes: dict[str, tuple[int, int]]
    tensors: dict[str, StoredTensor]
    format_version: int | None
    version: str | None
    report: dict[str, Any] | None
    rotations: Rotations | None
    kv_bits: int
    clipped: bool
    lookup: SchemeLookup = field(repr=False)

    def codes_of(self, name: str) -> StoredTensor:
        """The tensor that holds the codes of the quantized linear `name`."""
        return next(self.tensors[key] for part in CODES.values() if (key := f"{name}.{part}") in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model: what config.json names, by either name of the field; if it names none, that of the scales.

        Raises:
            CheckpointError: config.json names another one than float32, bfloat16 or float16.
        """
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is None:
            return _SCALE_DTYPES[self.tensors[f"{next(iter(self.schemes))}.weight_scale"].dtype]
        found = {str(dtype).removeprefix("torch."): dtype for dtype in _SCALE_DTYPES.values()}.get(
            str(named).removeprefix("torch.")
        )
        if found is None:
            raise CheckpointError(
                f"{self.path / 'config.json'}: dtype is {named!r}, expected float32, bfloat16 or float16: correct it, "
                "or load with another dtype than auto"
            )
        return found

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the headers of a quantized checkpoint folder.

    Raises:
        InputError: `path` is not a folder, or not one of a quantized model.
        CheckpointError: the folder is damaged, incomplete, inconsistent, in a format that sliderquant does not read, or
            from a newer sliderquant; the message names the file and the tensor.
    """
    folder = Path(path)
    config = _read_config(folder)
    where = f"{folder / 'config.json'}: quantization_config"
    entry = config.get("sliderquant") or {}
    if not isinstance(entry, dict):
        raise CheckpointError(f"{folder / 'config.json'}: sliderquant is {entry!r}, expected a JSON object")
    version = entry.get("format_version")
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise CheckpointError(
            f"{folder / 'config.json'}: sliderquant.format_version is {version!r}, expected a whole number"
        )
    if version is not None and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: written by a newer sliderquant (format {version}; this is {FORMAT_VERSION}): upgrade "
            "sliderquant"
        )
    lookup = SchemeLookup(config["quantization_config"], where)
    described = read_entry(config, str(folder / "config.json"))
    tensors = _read_headers(folder)
    schemes, linear_shapes = _check_linears(folder, tensors, lookup, described.clipped)
    rounds = described.kv_bits < 16 or any(scheme.quantizes_activations for scheme in schemes.values())
    if described.clipped and not rounds:
        raise CheckpointError(
            f"{folder / 'config.json'}: sliderquant.activation_clipping is true, but neither inputs of linears nor "
            "queries, keys and values are quantized"
        )
    return Checkpoint(
        path=folder,
        config=config,
        schemes=schemes,
        linear_shapes=linear_shapes,
        tensors=tensors,
        format_version=version,
        version=entry.get("version") if version is not None else None,
        report=_read_report(folder / REPORT_NAME),
        rotations=described.rotations,
        kv_bits=described.kv_bits,
        clipped=described.clipped,
        lookup=lookup,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_report(path: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read: nothing in it is needed to run the model."""
    if not path.exists():
        return None
    try:
        return _read_json(path)
    except CheckpointError as error:
        logger.warning("%s: it is ignored", error)
        return None


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        hint = ""
        if not folder.exists() and not folder.is_absolute() and str(folder).count("/") == 1:
            hint = f"; download a model of the Hugging Face hub first: hf download {folder} --local-dir FOLDER"
        raise InputError(f"{folder}: {what}, expected the folder of a quantized checkpoint{hint}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json: not a checkpoint folder, or an incomplete copy of one")
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("quantization_config"), dict):
        raise InputError(
            f"{folder}: config.json has no quantization_config: this model is not quantized. Quantize it first with "
            "`sliderquant quantize`, or load it with transformers.AutoModelForCausalLM.from_pretrained"
        )
    return config


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / INDEX_NAME
    weight_map: Mapping[str, str] | None = None
    # As transformers reads a folder: save_pretrained leaves the index of an earlier save beside a single file.
    if not (folder / WEIGHTS_NAME).is_file() and index_path.exists():
        try:
            weight_map = listed_files(index_path)
        except InputError as error:
            raise CheckpointError(str(error)) from error
        names = sorted(set(weight_map.values()))
    else:
        names = [WEIGHTS_NAME]
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        file_path = folder / name
        if not file_path.is_file():
            listed = f", which {INDEX_NAME} lists" if weight_map is not None else ""
            raise CheckpointError(f"{file_path}: missing{listed}: an incomplete copy; copy or download it again")
        try:
            with safe_open(file_path, framework="pt") as file:
                for key in sorted(file.keys()):
                    header = file.get_slice(key)
                    if weight_map is not None and weight_map.get(key) != name:
                        continue
                    value = tuple(file.get_tensor(key).tolist()) if key.endswith(".weight_shape") else None
                    tensors[key] = StoredTensor(file_path, header.get_dtype(), tuple(header.get_shape()), value)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file_path}: truncated, or its header is damaged ({error}); copy or download it again"
            ) from error
    for key, name in (weight_map or {}).items():
        if key not in tensors:
            raise CheckpointError(f"{folder / name}: tensor {key} is missing, which {INDEX_NAME} lists in this file")
    return tensors


def _check_linears(
    folder: Path, tensors: Mapping[str, StoredTensor], lookup: SchemeLookup, clipped: bool
) -> tuple[dict[str, Scheme], dict[str, tuple[int, int]]]:
    holding = _names_of_codes(tensors)
    for name in lookup.explicit_names:
        if name not in holding:
            key = f"{name}.{CODES[lookup.format_of(name) or PACKED]}"
            what = f"has dtype {tensors[key].dtype}, expected I8" if key in tensors else "is missing"
            raise CheckpointError(f"{folder}: tensor {key} {what}: config.json names {name} as a quantized linear")
    if not holding:
        raise CheckpointError(
            f"{folder}: no tensor ends in .weight_packed, and no .weight is int8, but config.json says the model is "
            "quantized"
        )
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, int]] = {}
    # Scales without codes are left of a linear that is incomplete.
    scaled = {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")}
    for name in sorted(holding.keys() | {name for name in scaled if lookup.find(name) is not None}):
        scheme, stored_format = lookup.find(name), lookup.format_of(name)
        if scheme is None or stored_format is None:
            raise CheckpointError(
                f"{tensors[holding[name]].file}: tensor {holding[name]} holds the codes of a quantized weight, but the "
                "quantization_config of config.json does not quantize this layer"
            )
        shapes[name] = _check_linear(name, tensors, scheme, stored_format, folder, clipped)
        schemes[name] = scheme
    return schemes, shapes


def _names_of_codes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """By linear, the name of the tensor that holds its codes."""
    packed, int8 = f".{CODES[PACKED]}", f".{CODES[INT8]}"
    holding = {key.removesuffix(int8): key for key, stored in tensors.items() if key.endswith(int8)}
    holding = {name: key for name, key in holding.items() if tensors[key].dtype == "I8"}  # others are dense
    return holding | {key.removesuffix(packed): key for key in tensors if key.endswith(packed)}


def _check_linear(
    name: str,
    tensors: Mapping[str, StoredTensor],
    scheme: Scheme,
    stored_format: str,
    folder: Path,
    clipped: bool,
) -> tuple[int, int]:
    dtypes = _PART_DTYPES[stored_format]

    def stored(part: str) -> StoredTensor:
        key = f"{name}.{part}"
        if key not in tensors:
            raise CheckpointError(
                f"{folder}: tensor {key} is missing: config.json says that {name} is {scheme}, {stored_format}"
            )
        found = tensors[key]
        if found.dtype not in dtypes[part]:
            expected = " or ".join(dtypes[part])
            raise CheckpointError(f"{found.file}: tensor {key} has dtype {found.dtype}, expected {expected}")
        return found

    # The words of a packed weight may hold more codes than the weight.
    sized_by = "weight_shape" if stored_format == PACKED else CODES[INT8]
    sized = stored(sized_by)
    size = sized.value if stored_format == PACKED else sized.shape
    if size is None or len(size) != 2:
        expected = "[2]" if stored_format == PACKED else "[out, in]"
        raise CheckpointError(
            f"{sized.file}: tensor {name}.{sized_by} has shape {list(sized.shape)}, expected {expected}"
        )
    out_features, in_features = size
    if out_features < 1 or in_features < 1 or not scheme.fits(in_features):
        raise CheckpointError(
            f"{sized.file}: tensor {name}.{sized_by} says [{out_features}, {in_features}], which {scheme} of "
            "config.json does not divide"
        )
    shapes = stored_shapes(scheme, out_features, in_features, stored_format)
    if clipped and scheme.quantizes_activations:
        shapes[INPUT_CLIP] = (2,)
    for part, expected_shape in shapes.items():
        found = stored(part)
        if found.shape != expected_shape:
            raise CheckpointError(
                f"{found.file}: tensor {name}.{part} has shape {list(found.shape)}, expected {list(expected_shape)}: "
                f"{sized_by} is [{out_features}, {in_features}] and config.json says {scheme}"
            )
    for unexpected in (*PARTS, "weight_g_idx", INPUT_CLIP):
        key = f"{name}.{unexpected}"
        if key in tensors and unexpected not in shapes:
            raise CheckpointError(
                f"{tensors[key].file}: tensor {key} should not be there: config.json says that {name} is {scheme}, "
                f"{stored_format}, in the order of the inputs"
            )
    return out_features, in_features
