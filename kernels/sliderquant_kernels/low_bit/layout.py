"""How the weight of a low-bit linear lies in memory for one device.

| kind            | device | what                                                     | bits per weight |
|-----------------|--------|----------------------------------------------------------|-----------------|
| `triton_int8`   | cuda   | fragments of int8 instructions, `fragments`              | b = 2, 4, 8     |
| `cpu_vnni`      | cpu    | blocks for AVX512-VNNI, `cpu.vnni_blocks`, `cpu.vnni`    | b = 2, 4, 8     |
| `cpu_int8_rows` | cpu    | elsewhere: int8 rows for torch's int8 matmul             | 8               |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..common.layout import GROUP_SIZES, PackedLayout, PackedWeight, TensorSpec, check_specs
from ..cpu import native, vnni_blocks
from . import fragments

VERSIONS = {"triton_int8": 1, "cpu_vnni": 1, "cpu_int8_rows": 1}


@dataclass(frozen=True)
class LowBitLayout(PackedLayout):
    """One weight `[n, k]` of `bits`-bit codes (2, 4, 8) for products with int8 activations.

    `group_size` is 32, 64, 128, or None for one scale per output channel, the fast path; 8 bits in groups only
    symmetric. `version` 0 becomes the current one. Raises ValueError for what no kernel computes.
    """

    versions: ClassVar[dict[str, int]] = VERSIONS
    rounds_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_kind()
        if self.bits not in fragments.BITS:
            raise ValueError(f"bits: expected 2, 4 or 8, got {self.bits}; store 3-bit codes as 4-bit ones")
        limit = fragments.MAX_K[self.bits]
        if self.n < 1 or not 1 <= self.k <= limit:
            raise ValueError(
                f"n, k: expected n from 1 and k from 1 to {limit}, beyond which sums of {self.bits}-bit weights and "
                f"8-bit activations could leave int32, got n={self.n}, k={self.k}"
            )
        if self.group_size is not None and (self.group_size not in GROUP_SIZES or self.k % self.group_size):
            raise ValueError(
                f"group_size: expected 32, 64 or 128 that divides k={self.k}, or None; got {self.group_size}"
            )
        if self.group_size is not None and self.bits == 8 and not self.symmetric:
            raise ValueError(
                "symmetric: 8-bit weights in groups have no zero-points here, since int8 holds no difference of two "
                "8-bit numbers; quantize them symmetrically or per channel"
            )

    @property
    def code_offset(self) -> int:
        return fragments.shift(self.bits)

    @property
    def device_type(self) -> str:
        """The device type whose op reads this layout."""
        return "cuda" if self.kind == "triton_int8" else "cpu"

    def specs(self) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
        """Shapes and dtypes of the packed codes, the scales (fp32), and the zero-points and sums (int32)."""
        return _specs(self.kind, self.bits, self.n, self.k, self.group_size)

    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> PackedWeight:
        """Pack codes `[N, K]` uint8, scale `[N, G]` fp16/bf16/fp32 (finite, > 0), zero_point `[N, G]` uint8 or None.

        Raises ValueError or TypeError for anything else, and for codes or zero-points beyond 2^bits - 1.
        """
        self._check_parts(codes, scale, zero_point)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("scale: expected finite values above 0, got zero, negative, infinite or NaN")
        constants = fragments.constants(codes, scale, zero_point, self.bits, self.group_size)
        scales = fragments.pack_scales(scale, self.k, self.bits, self.group_size)
        if self.kind == "triton_int8":
            return PackedWeight(fragments.pack_codes(codes, self.bits), scales, constants)
        if self.kind == "cpu_vnni":
            return PackedWeight(vnni_blocks.pack_codes(codes, self.bits), scales, constants)
        return PackedWeight((codes ^ fragments.shift(self.bits)).view(torch.int8), scales, constants)

    def unpack(self, packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """The inverse of `pack`: codes `[N, K]` uint8, scale `[N, G]` fp32, zero_point `[N, G]` uint8 or None."""
        self.check_packed(packed)
        weight, scale, constants = packed
        assert constants is not None
        if self.kind == "triton_int8":
            codes = fragments.unpack_codes(weight, self.bits, self.n, self.k)
        elif self.kind == "cpu_vnni":
            codes = vnni_blocks.unpack_codes(weight, self.bits, self.n, self.k)
        else:
            codes = weight.view(torch.uint8) ^ fragments.shift(self.bits)
        zero = None if self.symmetric else fragments.zero_points(constants, self.bits, self.n, self.groups)
        return codes, scale[: self.groups, : self.n].t().contiguous(), zero

    def check_packed(self, packed: PackedWeight) -> None:
        """Raise ValueError or TypeError, naming the tensor, unless `packed` has this layout's shapes and dtypes."""
        check_specs(packed, self.specs(), f"kind {self.kind!r}")


def choose_low_bit_layout(
    bits: int, n: int, k: int, group_size: int | None, symmetric: bool, device: torch.device | str
) -> LowBitLayout:
    """The layout for a weight `[n, k]` that multiplies int8 activations on `device`, `cuda` or `cpu`.

    Raises ValueError for an unsupported width, grouping, shape or device.
    """
    device_type = torch.device(device).type
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cuda or cpu, got {device_type!r}; move the model to one of them")
    kind = "triton_int8"
    if device_type == "cpu":
        kind = "cpu_vnni" if native.vnni(4) is not None else "cpu_int8_rows"
    return LowBitLayout(kind, bits, n, k, group_size, symmetric)


@lru_cache(maxsize=1024)
def _specs(kind: str, bits: int, n: int, k: int, group_size: int | None) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    padded = -(-n // fragments.ROWS) * fragments.ROWS
    groups = fragments.groups_of(k, bits, group_size)
    weight = TensorSpec((n, k), torch.int8)
    if kind == "triton_int8":
        weight = TensorSpec(fragments.weight_shape(n, k, bits), torch.uint8)
    elif kind == "cpu_vnni":
        weight = TensorSpec(vnni_blocks.weight_shape(n, k, bits), torch.uint8)
    return weight, TensorSpec((groups, padded), torch.float32), TensorSpec((groups + 1, padded), torch.int32)
