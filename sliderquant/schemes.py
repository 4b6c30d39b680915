"""What is stored: bits, grouping and symmetry. `"W4A16-g128"` and `Scheme(bits=4, group_size=128)` are the same."""

import math
import re
from dataclasses import dataclass, replace

from sliderquant.errors import InputError

__all__ = ["BITS", "GROUP_SIZES", "Scheme"]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)

_GRAMMAR = re.compile(
    r"W(?P<bits>\d+)A(?P<activation_bits>\d+)(-(?P<grouping>g\d+|channel))?(-(?P<symmetry>sym|asym))?", re.IGNORECASE
)
_EXPECTED = (
    "expected W{2,3,4,8}A16, then -g32, -g64 or -g128 for groups (none: one scale per output channel), then -sym for a "
    "grid without zero-points; for example W4A16-g128, W2A16, W3A16-g64-sym"
)


@dataclass(frozen=True)
class Scheme:
    """How the weight of a linear layer is stored.

    Attributes:
        bits: bits of one weight: 2, 3, 4 or 8.
        group_size: consecutive inputs of a row that share one scale and zero-point: 32, 64 or 128; None: a whole row.
        symmetric: no zero-point; the levels are -2^(bits-1) .. 2^(bits-1)-1 times the scale.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"scheme: weights of {self.bits} bits are not supported; {_EXPECTED}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(f"scheme: groups of {self.group_size} are not supported; {_EXPECTED}")

    @classmethod
    def parse(cls, text: "str | Scheme") -> "Scheme":
        """Read `W4A16-g128`, `w2a16`, `W3A16-g64-sym`, ...; a Scheme is returned as it is.

        Raises:
            InputError: the text does not follow the grammar, or names a scheme that cannot be stored.
        """
        if isinstance(text, Scheme):
            return text
        found = _GRAMMAR.fullmatch(text.strip())
        if found is None:
            raise InputError(f"scheme {text!r} is not understood: {_EXPECTED}")
        if found["activation_bits"] != "16":
            raise InputError(
                f"scheme {text!r}: activations of {found['activation_bits']} bits are not supported; {_EXPECTED}"
            )
        grouping = (found["grouping"] or "channel").lower()
        return cls(
            bits=int(found["bits"]),
            group_size=None if grouping == "channel" else int(grouping[1:]),
            symmetric=(found["symmetry"] or "").lower() == "sym",
        )

    def __str__(self) -> str:
        grouping = "" if self.group_size is None else f"-g{self.group_size}"
        return f"W{self.bits}A16{grouping}{'-sym' if self.symmetric else ''}"

    @property
    def levels(self) -> int:
        """Number of codes minus one, 2^bits - 1: the largest code."""
        return 2**self.bits - 1

    @property
    def offset(self) -> int:
        """The unsigned code that stands for 0 in a symmetric scheme, 2^(bits-1)."""
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Whether whole groups fill a row of `in_features` weights."""
        return self.group_size is None or in_features % self.group_size == 0

    def fitting_group_sizes(self, in_features: int) -> tuple[int, ...]:
        """The supported group sizes that divide `in_features`."""
        return tuple(size for size in GROUP_SIZES if in_features % size == 0)

    def per_channel(self) -> "Scheme":
        """The same scheme with one scale per output channel."""
        return replace(self, group_size=None)

    def stored_bytes(self, out_features: int, in_features: int, scale_bytes: int = 2) -> int:
        """Bytes that the weight `[out_features, in_features]` takes in a checkpoint: packed codes, scales, packed
        zero-points and the stored shape."""
        groups = self.groups(in_features)
        total = out_features * 4 * math.ceil(in_features * self.bits / 32) + out_features * groups * scale_bytes + 16
        if not self.symmetric:
            total += 4 * math.ceil(out_features * self.bits / 32) * groups
        return total
