"""The tensors of compressed-tensors' formats: what a quantized linear looks like on disk.

A linear `[out, in]` of b bits and `groups` groups per row is stored, in the format `pack-quantized`, as

    weight_packed      int32 [out, ceil(in * b / 32)]      codes as a little-endian bit stream along `in`
    weight_scale       float [out, groups]
    weight_zero_point  int32 [ceil(out * b / 32), groups]  asymmetric only; codes as a bit stream along `out`
    weight_shape       int64 [2]                           (out, in): the words may hold more codes than the weight

or, in the format `int-quantized`, as

    weight             int8  [out, in]                     codes - 2^(b-1)
    weight_scale       float [out, groups]
    weight_zero_point  int8  [out, groups]                 asymmetric only, which other tools write; - 2^(b-1) as well

and, where the range of its rounded input is clipped,

    input_clip         fp32  [2]                           factors on the lower and the upper end

`Scheme.stored_format` says in which of them a scheme is written; every scheme is read in either.

Invariant: `unpack(pack(q, scheme), scheme) == q`, exactly.
"""

import math
from collections.abc import Callable, Mapping

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn

from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.schemes import Scheme

__all__ = ["CODES", "INPUT_CLIP", "INT8", "PACKED", "PARTS", "pack", "stored_shapes", "unpack"]

PACKED, INT8 = "pack-quantized", "int-quantized"
"""The formats, by their names in compressed-tensors."""

CODES = {PACKED: "weight_packed", INT8: "weight"}
"""By format, the name of the tensor with the codes."""

PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape")
"""The names of the tensors of a quantized linear in any format, after the name of the linear and a dot."""

INPUT_CLIP = "input_clip"
"""Of the tensor of a linear with the clipping of its input; see `sliderquant.checkpoint.clips`."""

# The library's packer works in int32, several times over: this bounds what a very large linear takes meanwhile.
_CODES_AT_A_TIME = 1 << 20


def stored_shapes(
    scheme: Scheme, out_features: int, in_features: int, stored_format: str | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every stored part of a linear `[out_features, in_features]`, in the order of `PARTS`.

    Args:
        stored_format: `PACKED` or `INT8`; None: the one that the scheme is written in.
    """
    groups = scheme.groups(in_features)
    if (stored_format or scheme.stored_format) == INT8:
        int8: dict[str, tuple[int, ...]] = {
            "weight": (out_features, in_features),
            "weight_scale": (out_features, groups),
        }
        return int8 if scheme.symmetric else {**int8, "weight_zero_point": (out_features, groups)}
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (out_features, math.ceil(in_features * scheme.bits / 32)),
        "weight_scale": (out_features, groups),
        "weight_shape": (2,),
    }
    if not scheme.symmetric:
        shapes["weight_zero_point"] = (math.ceil(out_features * scheme.bits / 32), groups)
    return shapes


def pack(quantized: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The stored parts of a quantized weight, by name, in the format of its scheme: of `PARTS` those that
    `stored_shapes` lists."""
    codes, scale, zero_point = quantized
    out_features, in_features = codes.shape
    if scheme.stored_format == INT8:
        return {"weight": _signed(codes, scheme).contiguous(), "weight_scale": scale.contiguous()}
    parts = {
        "weight_packed": _by_rows(
            lambda rows: pack_to_int32(_signed(rows, scheme), scheme.bits), codes, codes_per_row=in_features
        ),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([out_features, in_features], dtype=torch.int64),
    }
    if zero_point is not None:
        packed = pack_to_int32(_signed(zero_point, scheme), scheme.bits, packed_dim=0)
        # compressed-tensors 0.19 leaves it transposed; `contiguous` leaves the strides of a single row as they are.
        parts["weight_zero_point"] = packed.clone(memory_format=torch.contiguous_format)
    return parts


def unpack(parts: Mapping[str, Tensor], scheme: Scheme, codes: Tensor | None = None) -> QuantizedWeight:
    """The exact inverse of `pack`, on the device of the codes; of parts in either format.

    Args:
        parts: `weight_packed` or `weight`, and what belongs to it.
        codes: uint8 `[out, in]`, contiguous, to be filled with the codes; None: a new tensor.

    Raises:
        ValueError: an int8 is none of the scheme's codes.
    """
    if CODES[PACKED] not in parts:
        return _from_int8(parts, scheme, codes)
    out_features, in_features = (int(size) for size in parts["weight_shape"])
    words, scale = parts["weight_packed"].contiguous(), parts["weight_scale"]
    if codes is None:
        codes = words.new_empty(out_features, in_features, dtype=torch.uint8)
    rows = _rows_at_a_time(in_features)
    for start in range(0, out_features, rows):
        _unpack_into(codes[start : start + rows], words[start : start + rows], scheme.bits)
    if scheme.symmetric:
        return QuantizedWeight(codes, scale, None)
    # A clone has strides of its own; `contiguous` leaves a turned single row of words as it is.
    words = parts["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
    zero_point = codes.new_empty(scale.shape[1], out_features)
    _unpack_into(zero_point, words, scheme.bits)
    return QuantizedWeight(codes, scale, zero_point.T.contiguous())


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """uint8 0 .. 2^b - 1 -> int8 -2^(b-1) .. 2^(b-1) - 1, which is what the library packs."""
    return (codes - scheme.offset).view(torch.int8)  # uint8 wraps around


def _from_int8(parts: Mapping[str, Tensor], scheme: Scheme, codes: Tensor | None) -> QuantizedWeight:
    weight, scale = parts["weight"].contiguous(), parts["weight_scale"]
    if codes is None:
        codes = torch.empty_like(weight, dtype=torch.uint8)
    torch.add(weight.view(torch.uint8), scheme.offset, out=codes)  # wraps around: the inverse of `_signed`
    zero_point = None
    if not scheme.symmetric:
        zero_point = parts["weight_zero_point"].contiguous().view(torch.uint8) + scheme.offset
    for name, found in (("weight", codes), ("weight_zero_point", zero_point)):
        if scheme.bits < 8 and found is not None and int(found.max()) > scheme.levels:
            least, most = -scheme.offset, scheme.levels - scheme.offset
            raise ValueError(f"{name} holds a value outside of {least} .. {most}, the codes of {scheme}")
    return QuantizedWeight(codes, scale, zero_point)


def _unpack_into(codes: Tensor, words: Tensor, bits: int) -> None:
    """Fill codes uint8 `[rows, count]` from words int32 `[rows, ceil(count * bits / 32)]`, both contiguous.

    Not the library's unpacking, which takes 3 to 20 times as long for 2, 3 and 8 bits: as long as all else in loading.
    """
    # The fewest codes that fill whole bytes: 4 of 2 bits, 8 of 3 bits (in 3 bytes), 2 of 4 bits, 1 of 8 bits.
    run = 8 // math.gcd(bits, 8)
    rows, count = codes.shape
    run_bytes, runs = run * bits // 8, math.ceil(count / run)
    stored = words.view(torch.uint8)
    if stored.shape[1] < runs * run_bytes:
        stored = nn.functional.pad(stored, (0, runs * run_bytes - stored.shape[1]))
    stored = stored[:, : runs * run_bytes].unflatten(1, (runs, run_bytes))
    whole = codes if count == runs * run else codes.new_empty(rows, runs * run)
    by_run = whole.view(rows, runs, run)
    for i in range(run):
        byte, shift = divmod(i * bits, 8)
        code = stored[..., byte] >> shift
        if shift + bits > 8:
            code |= stored[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=by_run[..., i])
    if whole is not codes:
        codes.copy_(whole[:, :count])


def _rows_at_a_time(codes_per_row: int) -> int:
    return max(1, _CODES_AT_A_TIME // codes_per_row)


def _by_rows(function: Callable[[Tensor], Tensor], tensor: Tensor, codes_per_row: int) -> Tensor:
    rows = _rows_at_a_time(codes_per_row)
    if tensor.shape[0] <= rows:
        return function(tensor).contiguous()
    whole: Tensor | None = None
    for start in range(0, tensor.shape[0], rows):
        part = function(tensor[start : start + rows])
        if whole is None:
            whole = part.new_empty((tensor.shape[0], part.shape[1]))
        whole[start : start + rows] = part
    assert whole is not None
    return whole
