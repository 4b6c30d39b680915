"""What is quantized and how: names of schemes, and what they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..weight_only.operands import WeightScheme

__all__ = ["FUSED", "ActivationScheme", "LowBitScheme"]

RMS_NORM, SILU_MUL = "rms_norm", "silu_mul"
# What comes before quantizing.
FUSED = (RMS_NORM, SILU_MUL)


@dataclass(frozen=True)
class ActivationScheme:
    """Bits and symmetry per token, what comes before, and whether two codes go into a byte.

    narrow: of others' symmetric grids: the scale is the maximum over the largest code, 7 or 127.
    """

    bits: int
    symmetric: bool = False
    fused: str | None = None
    packed: bool = False
    narrow: bool = False

    @classmethod
    def parse(cls, name: str) -> ActivationScheme:
        """Read `A4`, `A8-sym`, `A4-packed`, `A4+rms_norm`, ... Raises ValueError for anything else."""
        found = re.fullmatch(rf"A([48])(-sym)?(-packed)?(?:\+({'|'.join(FUSED)}))?", name)
        if found is None or (found[3] and found[1] != "4"):
            raise ValueError(f"scheme: expected A{{4,8}}[-sym][-packed][+rms_norm|+silu_mul], got {name!r}")
        return cls(int(found[1]), bool(found[2]), found[4], bool(found[3]))

    def __str__(self) -> str:
        words = f"A{self.bits}{'-sym' if self.symmetric else ''}{'-packed' if self.packed else ''}"
        return f"{words}+{self.fused}" if self.fused else words

    @property
    def parts(self) -> int:
        """Tensors of a token's size that are read."""
        return 2 if self.fused == SILU_MUL else 1


@dataclass(frozen=True)
class LowBitScheme:
    """A weight's scheme, and that of the activations."""

    weight: WeightScheme
    activations: ActivationScheme

    @classmethod
    def parse(cls, name: str) -> LowBitScheme:
        """Read `W4A4`, `W8A8-sym-act-sym`, `W4A4-g128+rms_norm`, ... Raises ValueError for anything else."""
        pattern = rf"W([248])A([48])(-g(?:32|64|128))?(-sym)?(-act-sym)?(?:\+({'|'.join(FUSED)}))?"
        found = re.fullmatch(pattern, name)
        if found is None:
            wanted = "W{2,4,8}A{4,8}[-g32|-g64|-g128][-sym][-act-sym][+rms_norm|+silu_mul]"
            raise ValueError(f"scheme: expected {wanted}, got {name!r}")
        group = int(found[3][2:]) if found[3] else None
        activations = ActivationScheme(int(found[2]), bool(found[5]), found[6])
        return cls(WeightScheme(int(found[1]), group, bool(found[4])), activations)

    def __str__(self) -> str:
        weight, activations = self.weight, self.activations
        grouping = f"-g{weight.group_size}" if weight.group_size else ""
        symmetry = ("-sym" if weight.symmetric else "") + ("-act-sym" if activations.symmetric else "")
        words = f"W{weight.bits}A{activations.bits}{grouping}{symmetry}"
        return f"{words}+{activations.fused}" if activations.fused else words

    @property
    def plain(self) -> str:
        """The name without what comes before."""
        return str(self).partition("+")[0]
