"""Named methods as data: a window plan, what is learned, and the hyper-parameters; and what changes them by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from sliderquant.calibration.files import nearest
from sliderquant.errors import InputError
from sliderquant.planning.overrides import merged, nested, parse_overrides
from sliderquant.planning.settings import AwqSettings, GptqSettings, OneShotSettings, Settings, SmoothQuantSettings
from sliderquant.schemes import ModelScheme
from sliderquant.setting_errors import explained, setting_names

__all__ = [
    "DEFAULT_EFFORT",
    "METHODS",
    "Method",
    "check_scheme",
    "method_named",
    "parse_overrides",
    "setting_names",
    "with_overrides",
]


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes:
        engine: what runs it: `rounding` reads weights alone and needs no calibration text; `layers` looks at
            calibration activations once, layer by layer; `windows` learns in windows that slide over the layers.
        settings: `OneShotSettings` with the engine `layers`, `Settings` with `windows`; None with `rounding`.
        activation_settings: those with schemes that quantize activations; None: the same.
        activations: whether it is for schemes with quantized activations only, for those without only, or for any.
        rotations: what it rotates by if nothing is asked for; R3 only where queries and keys are quantized.
        rotates: with any scheme, or only where activations have 4 bits.
        efforts: by name, the settings that differ where minutes are traded for accuracy; none: it has one effort.
        weight_only_efforts: what differs further with schemes that leave activations as they are.
    """

    name: str
    summary: str
    engine: Literal["rounding", "layers", "windows"]
    settings: Settings | OneShotSettings | None
    activation_settings: Settings | None = None
    activations: Literal["any", "quantized", "not quantized"] = "any"
    rotations: tuple[str, ...] = ()
    rotates: Literal["any scheme", "4-bit activations"] = "any scheme"
    efforts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weight_only_efforts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings_for(self, scheme: ModelScheme) -> Settings | OneShotSettings | None:
        """The settings with a scheme."""
        quantized = scheme.quantizes_activations and self.activation_settings is not None
        return self.activation_settings if quantized else self.settings

    def effort_for(self, scheme: ModelScheme, effort: str) -> dict[str, Any]:
        """The settings of an effort that differ with a scheme."""
        further = {} if scheme.quantizes_activations else self.weight_only_efforts.get(effort, {})
        return {**self.efforts[effort], **further}

    def rotations_for(self, scheme: ModelScheme) -> tuple[str, ...]:
        """The rotations with a scheme."""
        if self.rotates == "4-bit activations" and scheme.linear.activation_bits > 4:
            return ()
        return tuple(name for name in self.rotations if name != "R3" or scheme.quantizes_attention)


_NO_RAMPS = {"shallow": 0, "deep": 0}
# The published settings: with quantized activations 20 epochs, and a fifth of the rate of the low-rank term.
_PUBLISHED = Settings()
_PUBLISHED_ACTIVATIONS = Settings.model_validate({"epochs": 20, "learning_rates": {"low_rank": 1e-4}})


def _changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate(merged(settings.model_dump(), changes))


# Ours. Every weight is learned, and the ends of every range apart from it: `python -m benchmarks ablate recipe`. On a
# real model epochs bring more than ramps in the same minutes (docs/recipe.md). At few bits offsets go far enough to fit
# the calibration text alone; next to rounded activations decay does not pay.
_LEARNED = {
    "epochs": 8,
    "windows": _NO_RAMPS,
    "gamma": 1,
    "rank": 0,
    "weights": True,
    "hardening": True,
    "clipping_start": "search",
    "grid": "free",
    "last_loss": "logits",
    "relative_loss": 0.25,
    "learning_rates": {"weights": 4e-3, "low_rank": 1e-3, "clipping": 1e-4},
}
_RECIPE = _changed(_PUBLISHED, **_LEARNED, weights_decay=0.333)
_ACTIVATION_RECIPE = _changed(
    _PUBLISHED_ACTIVATIONS,
    **_LEARNED,
    scales={"start": "statistics", "space": "log"},
    activation_clipping="auto",
)
DEFAULT_EFFORT = "default"
_EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "light": {"epochs": 2},
    DEFAULT_EFFORT: {},
    "best": {"epochs": 16},
}
# Fewer steps have less to hold against.
_WEIGHT_ONLY_EFFORTS: Mapping[str, Mapping[str, Any]] = {"light": {"weights_decay": 0.135}}

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("rtn", "round to nearest over each group's full range", "rounding", None),
        Method(
            "gptq",
            "layer by layer, rounding errors compensated by the weights not yet rounded",
            "layers",
            GptqSettings(),
        ),
        Method(
            "awq",
            "channel scales and clipping searched by the error of the output",
            "layers",
            AwqSettings(),
            activations="not quantized",
        ),
        Method(
            "smoothquant",
            "channel scales from the ranges of activations and weights, then round to nearest",
            "layers",
            SmoothQuantSettings(),
            activations="quantized",
        ),
        Method(
            "omniquant",
            "layer by layer, learned clipping and channel scales",
            "windows",
            _changed(_PUBLISHED, windows={**_NO_RAMPS, "size": 1}, gamma=1, rank=0),
            _changed(
                _PUBLISHED_ACTIVATIONS,
                windows={**_NO_RAMPS, "size": 1},
                gamma=1,
                rank=0,
                scales={"start": "statistics"},
            ),
        ),
        Method(
            "cbq",
            "sliding windows of two layers with low-rank terms, learned clipping and channel scales",
            "windows",
            _changed(_PUBLISHED, windows={**_NO_RAMPS, "size": 2}, gamma=1),
            _changed(_PUBLISHED_ACTIVATIONS, windows={**_NO_RAMPS, "size": 2}, gamma=1),
        ),
        Method(
            "sliderquant",
            "sliding windows; every weight and range is learned; with 4-bit activations on a rotated model",
            "windows",
            _RECIPE,
            _ACTIVATION_RECIPE,
            rotations=("R1", "R2", "R3", "R4"),
            rotates="4-bit activations",
            efforts=_EFFORTS,
            weight_only_efforts=_WEIGHT_ONLY_EFFORTS,
        ),
        Method(
            "sliderquant-published",
            "sliding windows with ramps and stages, low-rank terms and learned clipping: the paper's settings",
            "windows",
            _PUBLISHED,
            _PUBLISHED_ACTIVATIONS,
        ),
    )
}


def method_named(name: str) -> Method:
    """Raises InputError with the names there are."""
    if name not in METHODS:
        near = nearest(str(name), METHODS)
        suggestion = f"; did you mean {near}?" if near else ""
        raise InputError(f"unknown method {name!r}: expected one of {', '.join(METHODS)}{suggestion}")
    return METHODS[name]


def check_scheme(method: Method, scheme: ModelScheme) -> None:
    """Raises InputError when the method makes no sense with the scheme."""
    if method.activations == "quantized" and not scheme.quantizes_activations:
        raise InputError(
            f"method {method.name} with scheme {scheme}: it makes activations easier to round, and this scheme leaves "
            "them as they are: use a scheme such as W8A8 or W4A4, or method awq or gptq"
        )
    if method.activations == "not quantized" and scheme.quantizes_activations:
        raise InputError(
            f"method {method.name} with scheme {scheme}: it is for schemes that leave activations as they are: use a "
            "scheme such as W4A16, or method smoothquant or gptq"
        )


def with_overrides(
    method: Method, scheme: ModelScheme, overrides: Mapping[str, Any], effort: str | None = None
) -> Settings | OneShotSettings | None:
    """The method's settings with a scheme and nested `overrides`: `{"epochs": 10, "windows": {"shallow": 2}}`.

    Args:
        effort: one of the method's; None: its default. What is overridden wins.

    Raises:
        InputError: an effort that the method does not have; an unknown key or an unusable value; the message lists
            those there are.
    """
    if not isinstance(overrides, Mapping):
        raise InputError(f"settings {overrides!r}: expected a mapping of settings by name, such as {{'epochs': 10}}")
    overrides = nested(overrides, "settings")
    if effort is not None:
        if effort not in method.efforts:
            offered = ", ".join(method.efforts) or "none: use --method sliderquant, or the setting epochs"
            raise InputError(f"effort {effort!r}: method {method.name} has {offered}")
        overrides = merged(method.effort_for(scheme, effort), overrides)
    settings = method.settings_for(scheme)
    if settings is None:
        if overrides:
            raise InputError(
                f"method {method.name} has no settings, but {', '.join(map(str, overrides))} was set: leave it out"
            )
        return None
    try:
        return type(settings).model_validate(merged(settings.model_dump(), overrides))
    except ValidationError as error:
        others = {other.name: type(other.settings) for other in METHODS.values() if other.settings is not None}
        raise InputError(explained(error, type(settings), method.name, others)) from error
