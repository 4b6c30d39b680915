"""How many bits each linear of a model gets, so that together they lose least within a budget: a multiple-choice
knapsack, solved by dynamic programming over the bits spent."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch

from sliderquant.errors import InputError
from sliderquant.schemes import BITS, ModelScheme, Scheme

__all__ = ["Allocation", "allocate", "check_average_bits", "choices"]

_MOST_STATES = 2**18


@dataclass(frozen=True)
class Allocation:
    """Bits that were chosen.

    Attributes:
        budget: at most so many bits for a weight on average, without scales and zero-points.
        samples: of the calibration text, that the losses were measured on.
        bits: of every linear, by full name.
        losses: by linear, what it loses at each number of bits that it might have had, see
            `sliderquant.choosing.bits`. Of linears that get the same bits, the sum is what counted.
    """

    budget: float
    samples: int
    bits: dict[str, int]
    losses: dict[str, dict[int, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, scheme: Scheme, sizes: Mapping[str, int]) -> None:
        """Raises InputError when these are not bits of linears with `sizes` weights, by full name, that a model of the
        scheme can have."""
        if self.bits.keys() != sizes.keys():
            name = min(self.bits.keys() ^ sizes.keys())
            where = "has no such linear" if name in self.bits else "has it, without bits"
            raise InputError(f"allocation: {name}: the model {where}; expected one that was made for this model")
        for name, bits in self.bits.items():
            if bits not in choices(scheme):
                expected = ", ".join(map(str, choices(scheme)))
                raise InputError(f"allocation: {name} has {bits} bits; expected one of {expected} with scheme {scheme}")
        average = Fraction(sum(self.bits[name] * size for name, size in sizes.items()), sum(sizes.values()))
        if average > Fraction(repr(float(self.budget))):
            raise InputError(f"allocation: {float(average):.6g} bits on average; expected at most {self.budget:g}")


def choices(scheme: Scheme) -> tuple[int, ...]:
    """The numbers of bits that a linear may get, ascending: those of the scheme are the fewest."""
    return tuple(bits for bits in BITS if bits >= scheme.bits)


def check_average_bits(scheme: ModelScheme, average_bits: float) -> None:
    """Raises InputError where a model of the scheme cannot have so many bits for a weight on average."""
    linear = scheme.linear
    if scheme.quantizes_activations or scheme.quantizes_attention:
        raise InputError(
            f"average_bits {average_bits:g} with scheme {scheme}: bits are chosen for weight-only schemes: use one "
            f"such as {Scheme(linear.bits, linear.group_size, linear.symmetric)}, or leave average_bits out"
        )
    fewest, most = min(choices(linear)), max(choices(linear))
    if not fewest <= average_bits <= most:
        advice = "" if fewest == BITS[0] else f"; for fewer use a scheme of fewer bits, such as W{BITS[0]}A16"
        raise InputError(
            f"average_bits {average_bits:g} with scheme {scheme}: expected {fewest}, the fewest bits that a linear "
            f"gets with this scheme, to {most}, the most that there are{advice}"
        )


def allocate(
    sizes: Mapping[str, int], losses: Mapping[str, Mapping[int, float]], average_bits: float
) -> dict[str, int]:
    """The bits of every part with the least sum of losses, at most `average_bits` for a weight on average.

    Args:
        sizes: number of weights, by part.
        losses: by part, what is lost at each number of bits that it may have; the same numbers for all parts.
        average_bits: the budget; no less than the fewest bits.

    Returns:
        by part, in the order of `sizes`. No choice is better, unless the sizes have so small a common divisor that
        the sums of bits are too many to tell apart: then each part is charged up to 1/262144 of the budget more than
        it takes.
    """
    offered = sorted(next(iter(losses.values())))
    fewest, weights = offered[0], sum(sizes.values())
    # As it is written: 2.3 bits of 10 weights are 23 bits, though the float is below 2.3.
    spare = math.floor((Fraction(repr(float(average_bits))) - fewest) * weights)
    spare = min(spare, (offered[-1] - fewest) * weights)
    step = max(math.gcd(*sizes.values()), -(-spare // _MOST_STATES))
    states = spare // step + 1

    def steps(name: str, bits: int) -> int:
        return -(-sizes[name] * (bits - fewest) // step)

    # least[s]: the least loss of the parts so far with at most s steps beyond the fewest bits.
    least = torch.zeros(states, dtype=torch.float64)
    taken: dict[str, torch.Tensor] = {}
    for name in sizes:
        before, least = least, torch.full_like(least, torch.inf)
        taken[name] = torch.zeros(states, dtype=torch.uint8)
        for bits in offered:
            spent = steps(name, bits)
            if spent >= states:
                break
            option = before[: states - spent] + losses[name][bits]
            better = option < least[spent:]
            least[spent:][better] = option[better]
            taken[name][spent:][better] = bits
    found, state = {}, states - 1
    for name in reversed(list(sizes)):
        found[name] = int(taken[name][state])
        state -= steps(name, found[name])
    return {name: found[name] for name in sizes}
