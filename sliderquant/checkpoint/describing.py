"""What is in a checkpoint, as data: for `sliderquant inspect`."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sliderquant.checkpoint.checksums import CHECKSUMS_NAME
from sliderquant.checkpoint.config import Entry
from sliderquant.checkpoint.packing import PARTS
from sliderquant.checkpoint.reader import Checkpoint, read_checkpoint
from sliderquant.checkpoint.readers import Reader, readers
from sliderquant.schemes import bits_by_kind

__all__ = ["Description", "describe"]

_PART_LABELS = dict(zip(PARTS, ("packed weights", "int8 weights", "scales", "zero-points", "shapes"), strict=True))


@dataclass(frozen=True)
class Description:
    """What `describe` finds.

    Attributes:
        path: the folder.
        architecture: class of the model.
        schemes: by scheme (`W4A16-g128`), the number of linears.
        activations: by what the input of a linear is rounded to (`4 bits per token, asymmetric`; `not quantized`), the
            number of linears.
        kv_bits: bits of queries, keys and values; 16: not quantized.
        clipped: whether the ranges of what is rounded while the model runs are clipped.
        rotations: what the weights were rotated by: `R1` to `R4`.
        stored_formats: by format of compressed-tensors, the number of linears.
        readers: who reads it, and what they compute with it.
        layers: by kind of linear (`q_proj`, `down_proj`, ...), the number of quantized ones.
        bits_by_kind: by kind of linear (`mlp.down_proj`), the bits of a weight in every layer in order, a digit each.
        bytes_by_part: bytes on disk of packed weights, int8 weights, scales, zero-points, shapes, and of what is not
            quantized: embeddings, output head, norms, clipping of activations, other.
        total_bytes: of all tensors.
        disk_bytes: of all files of the folder.
        quantized_weights, weights: numbers of weights that are quantized, and of all.
        code_bits_per_weight: of the quantized weights alone, without scales and zero-points.
        quantized_bits_per_weight: with scales and zero-points, of the quantized weights alone.
        bits_per_weight: of the whole model.
        written_by: version of sliderquant, or None for another tool.
        method: from the report, or None.
        perplexity: from the report; empty if it has none.
        has_checksums, has_report: whether the folder has those files.
    """

    path: str
    architecture: str
    schemes: dict[str, int]
    activations: dict[str, int]
    kv_bits: int
    clipped: bool
    rotations: list[str]
    stored_formats: dict[str, int]
    readers: list[Reader]
    layers: dict[str, int]
    bits_by_kind: dict[str, str]
    bytes_by_part: dict[str, int]
    total_bytes: int
    disk_bytes: int
    quantized_weights: int
    weights: int
    code_bits_per_weight: float
    quantized_bits_per_weight: float
    bits_per_weight: float
    written_by: str | None
    method: str | None
    perplexity: dict[str, Any]
    has_checksums: bool
    has_report: bool


def describe(path: str | Path) -> Description:
    """Describe a quantized checkpoint from its headers.

    Raises:
        InputError, CheckpointError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    by_part, dense_weights = _sizes(checkpoint)
    quantized_weights = sum(out * inputs for out, inputs in checkpoint.linear_shapes.values())
    code_bits = sum(
        scheme.bits * math.prod(checkpoint.linear_shapes[name]) for name, scheme in checkpoint.schemes.items()
    )
    quantized_bytes = sum(by_part.get(label, 0) for label in _PART_LABELS.values())
    total_bytes = sum(by_part.values())
    report = checkpoint.report or {}
    entry = Entry(checkpoint.rotations, checkpoint.kv_bits, checkpoint.clipped)
    method, perplexity = report.get("method"), report.get("perplexity")
    return Description(
        path=str(checkpoint.path),
        architecture=", ".join(checkpoint.config.get("architectures") or [str(checkpoint.config.get("model_type"))]),
        schemes=dict(Counter(str(scheme) for scheme in checkpoint.schemes.values())),
        activations=dict(Counter(scheme.activations for scheme in checkpoint.schemes.values())),
        kv_bits=checkpoint.kv_bits,
        clipped=checkpoint.clipped,
        rotations=[] if checkpoint.rotations is None else list(checkpoint.rotations.transforms),
        stored_formats=dict(Counter(checkpoint.lookup.format_of(name) or "" for name in checkpoint.schemes)),
        readers=readers(checkpoint.schemes.values(), entry, checkpoint.dtype),
        layers=dict(Counter(name.rpartition(".")[2] for name in checkpoint.schemes)),
        bits_by_kind=bits_by_kind(checkpoint.schemes),
        bytes_by_part=by_part,
        total_bytes=total_bytes,
        disk_bytes=sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file()),
        quantized_weights=quantized_weights,
        weights=quantized_weights + dense_weights,
        code_bits_per_weight=code_bits / quantized_weights,
        quantized_bits_per_weight=8 * quantized_bytes / quantized_weights,
        bits_per_weight=8 * total_bytes / (quantized_weights + dense_weights),
        written_by=checkpoint.version,
        method=method.get("name") if isinstance(method, dict) else method,
        perplexity=perplexity if isinstance(perplexity, dict) else {},
        has_checksums=(checkpoint.path / CHECKSUMS_NAME).is_file(),
        has_report=checkpoint.report is not None,
    )


def _sizes(checkpoint: Checkpoint) -> tuple[dict[str, int], int]:
    """Bytes by part, and the number of weights that are not quantized."""
    by_part: Counter[str] = Counter()
    dense_weights = 0
    for key, stored in checkpoint.tensors.items():
        name, _, part = key.rpartition(".")
        if name in checkpoint.schemes and part in _PART_LABELS:
            by_part[_PART_LABELS[part]] += stored.bytes
            continue
        by_part[_kind(key)] += stored.bytes
        dense_weights += 0 if key.endswith("_clip") else stored.count
    return dict(by_part), dense_weights


def _kind(key: str) -> str:
    if "embed" in key or key.endswith("wte.weight"):
        return "embeddings"
    if key.endswith("_clip"):
        return "clipping"
    if key.startswith("lm_head."):
        return "output head"
    if "norm" in key:
        return "norms"
    return "other"
