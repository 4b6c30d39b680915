"""What is stored: bits, grouping and symmetry. `"W4A16-g128"` and `Scheme(bits=4, group_size=128)` are the same.

Activations of 16 bits are not quantized. Those of 4 or 8 bits are the inputs of the linears, rounded while the model
runs, each token to a grid of its own: nothing of them is stored but how. `KV4` and `KV8` round what attention
multiplies too: queries and keys after RoPE, and values, each head of each token to a grid of its own.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sliderquant.errors import InputError

__all__ = [
    "ACTIVATION_BITS",
    "BITS",
    "GROUP_SIZES",
    "KV_BITS",
    "ModelScheme",
    "Scheme",
    "attention_in_words",
    "bits_by_kind",
]

BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8, 16)
KV_BITS = (4, 8, 16)
GROUP_SIZES = (32, 64, 128)

_GRAMMAR = re.compile(
    r"W(?P<bits>\d+)A(?P<activation_bits>\d+)(KV(?P<kv_bits>\d+))?(-(?P<grouping>g\d+|channel))?(-(?P<symmetry>sym|asym))?"
    r"(-act-(?P<activation_symmetry>sym|asym))?",
    re.IGNORECASE,
)
_EXPECTED = (
    "expected W{2,3,4,8}A16 or W{2,4,8}A{4,8}, then KV4 or KV8 for quantized queries, keys and values, then -g32, -g64 "
    "or -g128 for groups (none: one scale per output channel), then -sym for weights without zero-points, then, after "
    "A4 and A8, -act-sym for activations without zero-points; for example W4A16-g128, W2A16, W3A16-g64-sym, W4A4KV4, "
    "W8A8-sym-act-sym"
)


@dataclass(frozen=True)
class Scheme:
    """How the weight of a linear layer is stored, and what its input is rounded to while the model runs.

    Attributes:
        bits: bits of one weight: 2, 3, 4 or 8.
        group_size: consecutive inputs of a row that share one scale and zero-point: 32, 64 or 128; None: a whole row.
        symmetric: no zero-point; the levels are -2^(bits-1) .. 2^(bits-1)-1 times the scale.
        activation_bits: bits of one input of the layer: 4 or 8, with weights of 2, 4 or 8 bits; 16: not quantized.
        activation_symmetric: the grid of a token has no zero-point.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    activation_bits: int = 16
    activation_symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"scheme: weights of {self.bits} bits are not supported; {_EXPECTED}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(f"scheme: groups of {self.group_size} are not supported; {_EXPECTED}")
        if self.activation_bits not in ACTIVATION_BITS:
            raise InputError(f"scheme: activations of {self.activation_bits} bits are not supported; {_EXPECTED}")
        if not self.quantizes_activations:
            if self.activation_symmetric:
                raise InputError(f"scheme: activations of 16 bits are not quantized: leave out -act-sym; {_EXPECTED}")
        elif self.bits == 3:
            raise InputError(
                f"scheme: weights of 3 bits take activations of 16 bits only, not of {self.activation_bits}: use "
                f"W3A16, or weights of 2 or 4 bits; {_EXPECTED}"
            )
        elif self.bits == 8 and self.group_size is not None and not self.symmetric:
            raise InputError(
                f"scheme: weights of 8 bits in groups, with activations of {self.activation_bits} bits, have no "
                f"zero-points: add -sym, or leave out -g{self.group_size}; {_EXPECTED}"
            )

    @classmethod
    def parse(cls, text: "str | Scheme") -> "Scheme":
        """Read `W4A16-g128`, `w2a16`, `W3A16-g64-sym`, `W4A4-act-sym`, ...; a Scheme is returned as it is.

        Raises:
            InputError: the text does not follow the grammar, or names a scheme that cannot be stored, or one of a whole
                model with KV4 or KV8.
        """
        if isinstance(text, Scheme):
            return text
        found = ModelScheme.parse(text)
        if found.quantizes_attention:
            raise InputError(f"scheme {text!r}: KV{found.kv_bits} is of a model, not of a linear: leave it out")
        return found.linear

    def __str__(self) -> str:
        return self.text()

    def text(self, attention: str = "") -> str:
        """As `parse` reads it, with what is said of attention in its place."""
        grouping = "" if self.group_size is None else f"-g{self.group_size}"
        activations = "-act-sym" if self.activation_symmetric else ""
        symmetric = "-sym" if self.symmetric else ""
        return f"W{self.bits}A{self.activation_bits}{attention}{grouping}{symmetric}{activations}"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the layer's input is rounded, or goes into the product as it is."""
        return self.activation_bits < 16

    @property
    def activations(self) -> str:
        """In words: `4 bits per token, asymmetric`, or `not quantized`."""
        if not self.quantizes_activations:
            return "not quantized"
        return f"{self.activation_bits} bits per token, {'symmetric' if self.activation_symmetric else 'asymmetric'}"

    @property
    def stored_format(self) -> str:
        """The format of compressed-tensors that a weight of this scheme is written in: `"int-quantized"`, one int8 for
        a code, where vLLM has kernels for these products of integers, which read no packed words; else
        `"pack-quantized"`."""
        int8 = self.bits == self.activation_bits == 8 and self.group_size is None
        return "int-quantized" if int8 and self.symmetric and self.activation_symmetric else "pack-quantized"

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
        zero-points and the stored shape; in `int-quantized`, codes and scales."""
        groups = self.groups(in_features)
        if self.stored_format == "int-quantized":
            return out_features * in_features + out_features * groups * scale_bytes
        total = out_features * 4 * math.ceil(in_features * self.bits / 32) + out_features * groups * scale_bytes + 16
        if not self.symmetric:
            total += 4 * math.ceil(out_features * self.bits / 32) * groups
        return total


@dataclass(frozen=True)
class ModelScheme:
    """What a model is quantized to: every linear, and what attention multiplies.

    Attributes:
        linear: of every linear, where no other bits are chosen for it.
        kv_bits: bits of queries, keys and values, 4 or 8, with zero-points; 16: not quantized.
    """

    linear: Scheme
    kv_bits: int = 16

    def __post_init__(self) -> None:
        if self.kv_bits not in KV_BITS:
            raise InputError(f"scheme: queries, keys and values of {self.kv_bits} bits are not supported; {_EXPECTED}")

    @classmethod
    def parse(cls, text: "str | Scheme | ModelScheme") -> "ModelScheme":
        """Read `W4A16-g128`, `W4A4KV4`, ...; a ModelScheme is returned as it is, a Scheme is that of the linears.

        Raises:
            InputError: the text does not follow the grammar, or names a scheme that cannot be stored.
        """
        if isinstance(text, ModelScheme):
            return text
        if isinstance(text, Scheme):
            return cls(text)
        found = _GRAMMAR.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise InputError(f"scheme {text!r} is not understood: {_EXPECTED}")
        grouping = (found["grouping"] or "channel").lower()
        linear = Scheme(
            bits=int(found["bits"]),
            group_size=None if grouping == "channel" else int(grouping[1:]),
            symmetric=(found["symmetry"] or "").lower() == "sym",
            activation_bits=int(found["activation_bits"]),
            activation_symmetric=(found["activation_symmetry"] or "").lower() == "sym",
        )
        return cls(linear, int(found["kv_bits"] or 16))

    def __str__(self) -> str:
        return self.linear.text(f"KV{self.kv_bits}" if self.quantizes_attention else "")

    @property
    def quantizes_activations(self) -> bool:
        """Whether the inputs of the linears are rounded."""
        return self.linear.quantizes_activations

    @property
    def quantizes_attention(self) -> bool:
        """Whether queries, keys and values are rounded."""
        return self.kv_bits < 16


def attention_in_words(kv_bits: int) -> str:
    """What a scheme with these `kv_bits` does to queries, keys and values."""
    if kv_bits == 16:
        return "not quantized"
    return f"queries, keys and values of {kv_bits} bits per token and head, asymmetric"


def bits_by_kind(schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """By kind of linear (`mlp.down_proj`), its bits in every layer in order: a digit for each."""
    digits: dict[str, dict[int, str]] = {}
    for name, scheme in schemes.items():
        numbered = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
        layer, kind = (int(numbered[1]), numbered[2]) if numbered else (0, name)
        digits.setdefault(kind, {})[layer] = str(scheme.bits)
    return {kind: "".join(found[layer] for layer in sorted(found)) for kind, found in digits.items()}
