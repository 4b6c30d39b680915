"""What is wrong with a setting, in one line: its name, what it takes, and what it was given."""

import difflib
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

__all__ = ["FrozenSettings", "explained", "reasons", "setting_names"]

_OPTIONS = (
    "model", "output", "scheme", "method", "effort", "calibration", "samples", "seqlen", "seed", "device", "perplexity",
    "rotate", "rotation_seeds", "average_bits", "per_channel_fallback", "overwrite",
)  # fmt: skip
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class FrozenSettings(BaseModel):
    """Settings that cannot change: no unknown names, no infinities, and no true or false for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true or false is no number")
        return value


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that can be set, nested ones with dots."""
    names = []
    for name, found in model.model_fields.items():
        inner = _inner(found)
        names += [prefix + name] if inner is None else setting_names(inner, f"{prefix}{name}.")
    return names


def explained(error: ValidationError, model: type[BaseModel], owner: str, others: Mapping[str, type[BaseModel]]) -> str:
    """One line for everything that is wrong.

    Args:
        owner: the method whose settings these are.
        others: settings of other methods, by the method's name, which an unknown name may belong to.
    """
    found: dict[str, str] = {}
    known = ""
    for one in error.errors(include_url=False):
        names, field = _place(one["loc"], model)
        key = ".".join(names)
        if one["type"] == "extra_forbidden":
            inner = one["input"]
            while isinstance(inner, Mapping) and inner:
                name, inner = next(iter(inner.items()))
                key = f"{key}.{name}"
            found.setdefault(key, _unknown(key, model, owner, others))
            known = f"{owner} has {', '.join(setting_names(model))}"
        elif field is None or (one["type"] == "value_error" and _inner(field) and not isinstance(one["input"], bool)):
            found.setdefault(key, one["msg"].removeprefix("Value error, "))  # settings that do not go together
        else:
            found.setdefault(key, f"setting {key!r}: expected {_expected(field, key)}, got {_shown(one['input'])}")
    return "; ".join([*found.values(), *([known] if known else [])])


def reasons(error: ValidationError) -> str:
    """Of somebody else's model, in one line: the innermost errors, each with the place and what is there."""
    found: dict[str, str] = {}
    places = [
        (one, ".".join(str(part) for part in one["loc"] if re.fullmatch(r"\w+", str(part))))
        for one in error.errors(include_url=False)
    ]
    deepest = max(place.count(".") for _, place in places)
    for one, place in places:
        if place.count(".") == deepest:
            message = one["msg"].removeprefix("Value error, ").rstrip(".")
            found.setdefault(place, f"{place} is {_shown(one['input'])}: {message}" if place else message)
    return "; ".join(found.values())


def _place(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], FieldInfo | None]:
    """The names of a setting, without what pydantic adds for alternatives of a type; and the field, if it is one."""
    names: list[str] = []
    inner: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in location:
        if inner is None:
            break
        names.append(str(part))
        field = inner.model_fields.get(str(part))
        inner = None if field is None else _inner(field)
    return names, field


def _field(name: str, model: type[BaseModel]) -> FieldInfo:
    """Of a name with dots."""
    first, _, rest = name.partition(".")
    field = model.model_fields[first]
    inner = _inner(field)
    return field if inner is None else _field(rest, inner)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    nested = field.annotation
    return nested if isinstance(nested, type) and issubclass(nested, BaseModel) else None


def _unknown(key: str, model: type[BaseModel], owner: str, others: Mapping[str, type[BaseModel]]) -> str:
    names = setting_names(model)
    near = _near(key, names)
    having = {
        method: name
        for method, other in others.items()
        for name in setting_names(other)
        if other is not model and _plain(name) == _plain(key)
    }
    if having and (near is None or _plain(near) != _plain(key)):
        hint = f"{' or '.join(dict.fromkeys(having.values()))} is of {', '.join(having)}, not of {owner}"
    elif key in _OPTIONS:
        hint = f"it is no setting, but an option of the command, --{key.replace('_', '-')}"
    else:
        hint = f"did you mean {near} ({_expected(_field(near, model), near)})?" if near else "there is no such"
    return f"unknown setting {key!r}: {hint}"


def _near(key: str, names: list[str]) -> str | None:
    """By the whole name, or by its last part alone."""

    for shorten in (lambda name: name, lambda name: name.rpartition(".")[2]):
        by_plain = {_plain(shorten(name)): name for name in reversed(names)}
        close = difflib.get_close_matches(_plain(shorten(key)), by_plain, n=1, cutoff=0.6)
        if close:
            return by_plain[close[0]]
    return None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")


def _expected(field: FieldInfo, key: str) -> str:
    inner = _inner(field)
    if inner is not None:
        return f"settings of its own: {', '.join(setting_names(inner, f'{key}.'))}"
    annotation = field.annotation
    choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = []
    for choice in choices:
        if get_origin(choice) is Literal:
            kinds.append(" or ".join(map(str, get_args(choice))))
        else:
            kinds.append(
                {bool: "true or false", int: "a whole number", float: "a finite number"}.get(choice, str(choice))
            )
    bounds = [
        f"{words} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, words in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return ", or ".join(kinds) + (f", {' and '.join(bounds)}" if bounds else "")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
