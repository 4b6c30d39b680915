"""What a run is asked to do: the arguments of a command or a call, checked and looked up once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sliderquant.devices import resolve_device
from sliderquant.errors import InputError
from sliderquant.planning.allocation import Allocation
from sliderquant.planning.arguments import check_arguments
from sliderquant.planning.methods import DEFAULT_EFFORT, Method, method_named, with_overrides
from sliderquant.planning.settings import OneShotSettings, Settings
from sliderquant.schemes import ModelScheme

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """One run, as it was asked for. The meaning of each field is that of the argument of `sliderquant.quantize`.

    Attributes:
        settings: those of the method with the scheme, the effort and what was overridden; None: it has none.
        effort: of a method that has efforts; None: the method has none.
        rotate: names of rotations; none: the model stays as it is.
        average_bits: None: all linears get the bits of the scheme.
        seqlen: None: the default of the model.
    """

    model: str | Path
    scheme: ModelScheme
    method: Method
    settings: Settings | OneShotSettings | None = None
    effort: str | None = None
    calibration: str | Path | None = "wikitext2"
    samples: int = 128
    seqlen: int | None = None
    seed: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    perplexity_on: str | Path | None = None
    output: str | Path | None = None
    overwrite: bool = False
    per_channel_fallback: bool = False
    rotate: tuple[str, ...] = ()
    rotation_seeds: int = 1
    average_bits: float | None = None
    allocation: Allocation | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Request":
        """From the arguments of `quantize` or `plan` by name; what is no field of a request is passed over.

        Raises:
            InputError: an argument has another type than its annotation, or a value that cannot be meant; there is no
                such method, effort, setting, scheme or device.
        """
        rotate = arguments["rotate"]
        if isinstance(rotate, Iterator):  # which could be read only once
            arguments = {**arguments, "rotate": tuple(rotate)}
        check_arguments(arguments)
        names = {one.name for one in fields(cls)}
        given = {name: value for name, value in arguments.items() if name in names}
        scheme, method = ModelScheme.parse(given["scheme"]), method_named(given["method"])
        settings = with_overrides(method, scheme, given["settings"] or {}, given["effort"])
        rotate = given["rotate"]
        return cls(
            **given
            | {
                "scheme": scheme,
                "method": method,
                "settings": settings,
                "effort": (given["effort"] or DEFAULT_EFFORT) if method.efforts else None,
                "device": resolve_device(given["device"]),
                "rotate": method.rotations_for(scheme) if rotate is None else tuple(rotate),
                "average_bits": _budget(given["average_bits"], given.get("allocation")),
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for the report; the settings are all of the method's, with what was overridden."""
        return {
            "model": str(self.model),
            "output": None if self.output is None else str(self.output),
            "scheme": str(self.scheme),
            "method": self.method.name,
            "effort": self.effort,
            "settings": None if self.settings is None else self.settings.model_dump(),
            "calibration": None if self.calibration is None else str(self.calibration),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "device": str(self.device),
            "perplexity_on": None if self.perplexity_on is None else str(self.perplexity_on),
            "per_channel_fallback": self.per_channel_fallback,
            "rotate": list(self.rotate),
            "rotation_seeds": self.rotation_seeds,
            "average_bits": self.average_bits,
        }


def _budget(average_bits: float | None, allocation: Allocation | None) -> float | None:
    """Bits of a weight on average, at most: those that are named, or of the allocation."""
    if allocation is None:
        return average_bits
    if average_bits not in (None, allocation.budget):
        raise InputError(
            f"average_bits {average_bits:g} with an allocation of at most {allocation.budget:g} bits: give one of the "
            "two"
        )
    return allocation.budget
