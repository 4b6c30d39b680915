"""What is quantized and how: names of schemes, and what they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..harness.shapes import Layer

__all__ = ["FUSED", "ActivationScheme", "LowBitScheme", "WeightScheme", "fused_before"]

RMS_NORM, SILU_MUL, HADAMARD, RESIDUAL = "rms_norm", "silu_mul", "hadamard", "residual"
# What comes before quantizing.
FUSED = (RMS_NORM, SILU_MUL)


@dataclass(frozen=True)
class ActivationScheme:
    """Bits and symmetry per token, what comes before, and whether two codes go into a byte.

    rotated: whether a Hadamard rotation comes last before quantizing; never right after a norm, where it is folded.
    narrow: of others' symmetric grids: the scale is the maximum over the largest code, 7 or 127.
    """

    bits: int
    symmetric: bool = False
    fused: str | None = None
    packed: bool = False
    rotated: bool = False
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
        return "".join([words, *(f"+{step}" for step in self.steps)])

    @property
    def steps(self) -> tuple[str, ...]:
        """What comes before quantizing, in order."""
        return (*((self.fused,) if self.fused else ()), *((HADAMARD,) if self.rotated else ()))

    @property
    def parts(self) -> int:
        """Tensors of a token's size that are read."""
        return 2 if self.fused == SILU_MUL else 1


@dataclass(frozen=True)
class LowBitScheme:
    """A weight's scheme, that of the activations, and whether a residual is added to the product."""

    weight: WeightScheme
    activations: ActivationScheme
    residual: bool = False

    @classmethod
    def parse(cls, name: str) -> LowBitScheme:
        """Read `W4A4`, `W8A8-sym-act-sym`, `W4A4-g128+rms_norm`, `W4A4+silu_mul+hadamard`, ... Raises ValueError for
        anything else."""
        steps = rf"(?:\+({'|'.join(FUSED)}))?(\+{HADAMARD})?(\+{RESIDUAL})?"
        pattern = rf"W([248])A([48])(-g(?:32|64|128))?(-sym)?(-act-sym)?{steps}"
        found = re.fullmatch(pattern, name)
        if found is None or (found[6] == RMS_NORM and found[7]):
            wanted = "W{2,4,8}A{4,8}[-g32|-g64|-g128][-sym][-act-sym][+rms_norm|[+silu_mul][+hadamard]][+residual]"
            raise ValueError(f"scheme: expected {wanted}, got {name!r}")
        group = int(found[3][2:]) if found[3] else None
        activations = ActivationScheme(int(found[2]), bool(found[5]), found[6], rotated=bool(found[7]))
        return cls(WeightScheme(int(found[1]), group, bool(found[4])), activations, bool(found[8]))

    @property
    def steps(self) -> tuple[str, ...]:
        """What comes before quantizing and after the product, in order."""
        return (*self.activations.steps, *((RESIDUAL,) if self.residual else ()))

    def __str__(self) -> str:
        weight, activations = self.weight, self.activations
        grouping = f"-g{weight.group_size}" if weight.group_size else ""
        symmetry = ("-sym" if weight.symmetric else "") + ("-act-sym" if activations.symmetric else "")
        words = f"W{weight.bits}A{activations.bits}{grouping}{symmetry}"
        return "".join([words, *(f"+{step}" for step in self.steps)])

    @property
    def plain(self) -> str:
        """The name without what comes before and after."""
        return str(self).partition("+")[0]


@dataclass(frozen=True)
class WeightScheme:
    """Bits, group size (None: per channel) and symmetry of a weight."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def parse(cls, name: str) -> WeightScheme:
        """Read `W4A16-g128`, `W8A16-sym`, ... Raises ValueError for anything else."""
        found = re.fullmatch(r"W([2348])A16(?:-g(32|64|128))?(-sym)?", name)
        if found is None:
            raise ValueError(f"scheme: expected W{{2,3,4,8}}A16[-g32|-g64|-g128][-sym], got {name!r}")
        return cls(int(found[1]), int(found[2]) if found[2] else None, bool(found[3]))

    def __str__(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"W{self.bits}A16{group}{'-sym' if self.symmetric else ''}"


def fused_before(layer: Layer) -> str | None:
    """What stands before a layer in a decoder: a norm before q, k, v and gate, up; SiLU-mul before down; else None."""
    kind = layer.name.partition(",")[0].rpartition(" ")[2]
    return {"o": None, "down": SILU_MUL}.get(kind, RMS_NORM)
