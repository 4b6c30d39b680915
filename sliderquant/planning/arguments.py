"""The types of what callers of the Python functions pass: checked first, so that no mistake shows after hours."""

import numbers
import os
from collections.abc import Mapping
from typing import Any

from sliderquant.errors import InputError
from sliderquant.schemes import ModelScheme, Scheme

__all__ = ["check_arguments"]

_PATH = ((str, os.PathLike), "a string or a path")
_COUNT = ((numbers.Integral,), "a whole number")
_EXPECTED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model": _PATH,
    "output": _PATH,
    "calibration": _PATH,
    "perplexity_on": _PATH,
    "scheme": ((str, Scheme, ModelScheme), 'a string such as "W4A16-g128", or a Scheme'),
    "method": ((str,), "the name of a method"),
    "effort": ((str,), '"light", "default" or "best"'),
    "settings": ((Mapping,), "a mapping from the names of settings to values"),
    "samples": _COUNT,
    "seqlen": _COUNT,
    "seed": _COUNT,
    "rotation_seeds": _COUNT,
    "average_bits": ((numbers.Real,), "a number"),
    "overwrite": ((bool,), "True or False"),
    "per_channel_fallback": ((bool,), "True or False"),
}
_OPTIONAL = ("output", "calibration", "perplexity_on", "effort", "settings", "seqlen", "average_bits", "rotate")
_LARGEST_SEED = 2**63 - 1


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the types of the arguments of `quantize`, `plan` and the like, by their names, and the range of `seed`.
    What is checked elsewhere is passed over.

    Raises:
        InputError: one has another type than its annotation; the message names it.
    """
    for name, value in arguments.items():
        if value is None and name in _OPTIONAL:
            continue
        if name == "rotate":
            if isinstance(value, str) or not all(isinstance(part, str) for part in _listed(value)):
                raise InputError(f'rotate {value!r}: expected a list of names such as ["R1", "R2"]')
            continue
        if name not in _EXPECTED:
            continue
        types, expected = _EXPECTED[name]
        # True and False are whole numbers to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise InputError(f"{name} {value!r}: expected {expected}, not {type(value).__name__}")
    seed = arguments.get("seed", 0)
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"seed {seed}: expected 0 to {_LARGEST_SEED}")


def _listed(value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        return [None]
