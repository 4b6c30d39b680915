"""How a quantized weight lies in memory for one device: frozen descriptions which can pack and unpack.

A layout is chosen once per weight and device (`choose_layout`), packs codes, scales and zero points into tensors, and
is handed to the ops together with them. Packed tensors are for the machine that packed them: store codes, scales and
zero points, or another tool's format, and pack when loading.

| kind       | device | what                                                                | bits per weight |
|------------|--------|---------------------------------------------------------------------|-----------------|
| `triton`   | cuda   | fragments of matrix instructions, see `fragments`                   | b               |
| `cpu_vnni` | cpu    | blocks for AVX512-VNNI, bf16 only, `cpu.vnni_blocks`, `cpu.vnni`  | b; 4 for b = 3  |
| `cpu_int4` | cpu    | torch's int4 container, bf16 only, see `cpu.int4`                   | 4, b = 2, 3, 4  |
| `cpu_int8` | cpu    | int8 rows for `_weight_int8pack_mm`, bf16, symmetric, per channel   | 8, b = 8        |
| `cpu_dense`| cpu    | the dequantized weight, fp32 or fp16                                | 32 or 16        |
| `cpu_bits` | cpu    | rows of planar bits, dequantized on every call                      | b               |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..common import workspace
from ..common.layout import DTYPES, GROUP_SIZES, PackedLayout, PackedWeight, TensorSpec, check_specs
from ..cpu import int4, native, vnni_blocks
from . import bits as bitpack
from . import fragments

# A kind's version changes whenever its bytes would be read differently.
VERSIONS = {"triton": 3, "cpu_vnni": 1, "cpu_int4": 1, "cpu_int8": 1, "cpu_dense": 1, "cpu_bits": 1}
INT8_MULTIPLE = 16


@dataclass(frozen=True)
class WeightLayout(PackedLayout):
    """One weight `[n, k]` of `bits`-bit codes in the memory order `kind`, of that kind's `version`.

    `group_size` is 32, 64, 128, or None for one scale per output channel; `version` 0 becomes the current one. Raises
    ValueError for what no kernel computes.
    """

    versions: ClassVar[dict[str, int]] = VERSIONS

    def __post_init__(self) -> None:
        self._check_kind()
        _check_scheme(self.bits, self.n, self.k, self.group_size)
        if self.kind == "cpu_int4" and not int4.fits(self.bits, self.n, self.k, self.group_size):
            raise ValueError(
                f"kind: 'cpu_int4' needs 2, 3 or 4 bits, n a multiple of {int4.ROW_MULTIPLE} and k of 32, "
                f"got bits={self.bits}, n={self.n}, k={self.k}; use choose_layout or 'cpu_bits'"
            )
        if self.kind == "cpu_vnni" and not vnni_blocks.token_group(self.k, self.group_size):
            raise ValueError(
                f"kind: 'cpu_vnni' needs k a multiple of 32, got k={self.k}; use choose_layout or 'cpu_bits'"
            )
        if self.kind == "cpu_int8" and not _int8_fits(self.bits, self.n, self.k, self.group_size, self.symmetric):
            raise ValueError(
                f"kind: 'cpu_int8' needs 8 bits, per channel, symmetric, n and k multiples of {INT8_MULTIPLE}, got "
                f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}, n={self.n}, k={self.k}; "
                "use choose_layout or 'cpu_bits'"
            )

    @property
    def code_offset(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def device_type(self) -> str:
        """The device type whose op reads this layout."""
        return "cuda" if self.kind == "triton" else "cpu"

    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> PackedWeight:
        """Pack codes `[N, K]` uint8, scale `[N, G]` fp16/bf16/fp32 (finite, > 0), zero_point `[N, G]` uint8 or None.

        Raises ValueError or TypeError for anything else, and for codes or zero points beyond 2^bits - 1.
        """
        self._check_pack(codes, scale, zero_point)
        if self.kind == "cpu_vnni":
            zero = None if zero_point is None else vnni_blocks.pack_groups(zero_point)
            return PackedWeight(vnni_blocks.pack_codes(codes, self.bits), vnni_blocks.pack_groups(scale), zero)
        if self.kind == "cpu_int4":
            weight, fused = int4.pack(codes, scale, zero_point, self.bits, self.group_size)
            return PackedWeight(weight, fused, None)
        if self.kind == "cpu_int8":
            return PackedWeight((codes ^ 0x80).view(torch.int8), scale.contiguous(), None)
        if self.kind == "triton":
            # Before any launch, which may run inside the memory pool of a CUDA graph.
            workspace.reserve(codes.device)
            shape = fragments.scale_shape(self.n, self.k, self.bits, self.group_size, self.symmetric)
            fused = fragments.pack_scales(scale, zero_point, self.bits, shape)
            return PackedWeight(fragments.pack_codes(codes, self.bits), fused, None)
        if self.kind == "cpu_dense":
            weight = _dense(codes, scale, zero_point, self.bits)
        else:
            weight = bitpack.pack_rows(codes, self.bits)
        return PackedWeight(weight, scale.contiguous(), None if zero_point is None else zero_point.contiguous())

    def unpack(self, packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """The exact inverse of `pack`: codes `[N, K]` uint8, scale `[N, G]`, zero_point `[N, G]` uint8 or None."""
        weight, scale, zero_point = packed
        self.check_packed(packed)
        if self.kind == "cpu_vnni":
            codes = vnni_blocks.unpack_codes(weight, self.bits, self.n, self.k)
            zero = None if zero_point is None else vnni_blocks.unpack_groups(zero_point, self.n)
            return codes, vnni_blocks.unpack_groups(scale, self.n), zero
        if self.kind == "cpu_int4":
            codes, scale, zero_point = int4.unpack(weight, scale, self.bits, self.group_size)
            return codes, scale, None if self.symmetric else zero_point
        if self.kind == "cpu_int8":
            return weight.view(torch.uint8) ^ 0x80, scale, None
        if self.kind == "triton":
            codes = fragments.unpack_codes(weight, self.bits, self.n, self.k)
            return codes, *fragments.unpack_scales(scale, self.bits, self.n, self.groups, self.symmetric)
        if self.kind == "cpu_dense":
            codes = _codes_of_dense(weight, scale, zero_point, self.bits)
        else:
            codes = bitpack.unpack_rows(weight, self.bits, self.k)
        return codes.contiguous(), scale, zero_point

    def specs(self) -> tuple[TensorSpec, TensorSpec, TensorSpec | None]:
        """What the packed weight, scale and zero_point must look like."""
        return _specs(self.kind, self.bits, self.n, self.k, self.group_size, self.symmetric)

    def bytes(self, scale_dtype: torch.dtype = torch.bfloat16) -> int:
        """Memory of the packed tensors."""
        total = 0
        for spec in self.specs():
            if spec is not None:
                total += math.prod(spec.shape) * (spec.dtype or scale_dtype).itemsize
        return total

    def check_packed(self, packed: PackedWeight) -> None:
        """Raise ValueError or TypeError, naming the tensor, unless `packed` has this layout's shapes and dtypes."""
        check_specs(packed, self.specs(), f"kind {self.kind!r} with symmetric={self.symmetric}")

    def _check_pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self._check_parts(codes, scale, zero_point)
        if self.kind in ("cpu_vnni", "cpu_int4", "cpu_int8") and scale.dtype != torch.bfloat16:
            raise TypeError(
                f"scale: kind {self.kind!r} expects bfloat16, got {scale.dtype}; "
                "pass the dtype of the activations to choose_layout, which then takes 'cpu_bits'"
            )
        if self.kind == "cpu_dense" and scale.dtype == torch.bfloat16:
            raise TypeError(
                "scale: kind 'cpu_dense' expects float32 or float16, got bfloat16, which does not tell the codes of 8 "
                "bits apart; pass the dtype of the activations to choose_layout"
            )
        # The container stores up to 8 scales as the zero; a scale beyond this could not be restored.
        limit = torch.finfo(scale.dtype).max / (8 if self.kind == "cpu_int4" else 1)
        if not bool(((scale > 0) & (scale <= limit)).all()):
            raise ValueError(f"scale: expected values above 0 and up to {limit:.3g}, got zero, negative, huge or NaN")
        if self.device_type == "cpu" and codes.device.type != "cpu":
            raise ValueError(
                f"codes: kind {self.kind!r} packs on the cpu, got {codes.device}; "
                "call choose_layout with the device of the activations, or move the codes to the cpu"
            )


def choose_layout(
    bits: int,
    n: int,
    k: int,
    group_size: int | None,
    symmetric: bool,
    device: torch.device | str,
    dtype: torch.dtype,
) -> WeightLayout:
    """The layout for a weight `[n, k]` that multiplies activations of `dtype` on `device`.

    A pure function of its arguments and, on a CPU, of its instruction set. On CUDA it is the Triton layout. On a CPU
    with AVX512-VNNI and bf16 activations it is that of the compiled loop wherever k is a multiple of 32. Elsewhere with
    bf16 activations, 2, 3 and 4 bits go into torch's int4 container wherever n is a multiple of 16 and k of 32
    (2 and 3 bits then take the memory of 4) and symmetric per-channel 8 bits into its int8 matmul; the
    rest keeps its own width and is dequantized on every call. With fp16 or fp32 activations no packed weight is
    multiplied faster than a dense one there: it is dequantized once, and takes the memory of the original.

    Raises ValueError for an unsupported width, grouping, shape or device, TypeError for an unsupported dtype.
    """
    _check_scheme(bits, n, k, group_size)
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype}; convert the activations")
    device_type = torch.device(device).type
    if device_type == "cuda":
        kind = "triton"
    elif device_type != "cpu":
        raise ValueError(f"device: expected cuda or cpu, got {device_type!r}; move the model to one of them")
    elif dtype == torch.bfloat16 and vnni_blocks.token_group(k, group_size) and native.vnni(bits) is not None:
        kind = "cpu_vnni"
    elif dtype == torch.bfloat16 and int4.fits(bits, n, k, group_size) and int4.is_fast():
        kind = "cpu_int4"
    elif (
        dtype == torch.bfloat16
        and _int8_fits(bits, n, k, group_size, symmetric)
        and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    ):
        kind = "cpu_int8"
    elif dtype != torch.bfloat16:
        kind = "cpu_dense"
    else:
        kind = "cpu_bits"
    return WeightLayout(kind, bits, n, k, group_size, symmetric)


def _dense(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """(q - z) * scale, `[N, K]` in the dtype of the scales, rounded once."""
    n, groups = scale.shape
    dense = codes.view(n, groups, -1).to(scale.dtype)
    dense.sub_(2 ** (bits - 1) if zero_point is None else zero_point.to(scale.dtype).unsqueeze(-1))
    dense.mul_(scale.unsqueeze(-1))
    if not bool(dense.isfinite().all()):
        raise ValueError(
            f"scale: codes times scales overflow {scale.dtype}, up to {float(scale.max()):.3g}; use float32"
        )
    return dense.view(codes.shape)


def _codes_of_dense(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """The inverse of `_dense`: what it rounded by is less than half a step: up to 255 steps, each by 2^-11 in fp16."""
    n, groups = scale.shape
    steps = torch.div(weight.view(n, groups, -1), scale.float().unsqueeze(-1)).round_()
    steps.add_(2 ** (bits - 1) if zero_point is None else zero_point.float().unsqueeze(-1))
    return steps.to(torch.uint8).view(weight.shape)


def _int8_fits(bits: int, n: int, k: int, group_size: int | None, symmetric: bool) -> bool:
    # torch's int8 matmul reads past the end of rows that are not a multiple of its vectors: wrong results and crashes.
    return bits == 8 and group_size is None and symmetric and n % INT8_MULTIPLE == 0 and k % INT8_MULTIPLE == 0


def _check_scheme(bits: int, n: int, k: int, group_size: int | None) -> None:
    if bits not in bitpack.SUPPORTED_BITS:
        raise ValueError(f"bits: expected 2, 3, 4 or 8, got {bits}; choose another scheme")
    for name, size in (("n", n), ("k", k)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected 32, 64, 128 or None (per channel), got {group_size}")
    if group_size is not None and k % group_size:
        raise ValueError(f"k: expected a multiple of group_size={group_size}, got {k}; use a smaller group or None")


@lru_cache(maxsize=1024)
def _specs(
    kind: str, bits: int, n: int, k: int, group_size: int | None, symmetric: bool
) -> tuple[TensorSpec, TensorSpec, TensorSpec | None]:
    if kind == "cpu_int4":
        group = int4.op_group_size(k, group_size)
        assert group is not None
        return TensorSpec((n, k // 2), torch.uint8), TensorSpec((k // group, n, 2), torch.bfloat16), None
    if kind == "cpu_vnni":
        shape = (1 if group_size is None else k // group_size, -(-n // vnni_blocks.ROWS) * vnni_blocks.ROWS)
        zeros = None if symmetric else TensorSpec(shape, torch.uint8)
        weights = TensorSpec(vnni_blocks.weight_shape(n, k, bits), torch.uint8)
        return weights, TensorSpec(shape, torch.bfloat16), zeros
    if kind == "triton":
        scales = fragments.scale_shape(n, k, bits, group_size, symmetric)
        return TensorSpec(fragments.weight_shape(n, k, bits), torch.uint8), TensorSpec(scales, None), None
    groups = 1 if group_size is None else k // group_size
    if kind == "cpu_int8":
        return TensorSpec((n, k), torch.int8), TensorSpec((n, 1), torch.bfloat16), None
    zero_point = None if symmetric else TensorSpec((n, groups), torch.uint8)
    if kind == "cpu_dense":
        return TensorSpec((n, k), None), TensorSpec((n, groups), None), zero_point
    return TensorSpec((n, bitpack.row_bytes(k, bits)), torch.uint8), TensorSpec((n, groups), None), zero_point
