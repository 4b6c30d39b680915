"""What is wrong with a setting, in one line: its name, what it takes, and what it was given."""

import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

__all__ = ["FrozenSettings", "explained", "setting_names"]

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
    for one in error.errors(include_url=False):
        names, field = _place(one["loc"], model)
        key = ".".join(names)
        if one["type"] == "extra_forbidden":
            found.setdefault(key, _unknown(key, model, owner, others))
        elif field is None or (one["type"] == "value_error" and _inner(field) and not isinstance(one["input"], bool)):
            found.setdefault(key, one["msg"].removeprefix("Value error, "))  # settings that do not go together
        else:
            found.setdefault(key, f"setting {key!r}: expected {_expected(field, key)}, got {_shown(one['input'])}")
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


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    nested = field.annotation
    return nested if isinstance(nested, type) and issubclass(nested, BaseModel) else None


def _unknown(key: str, model: type[BaseModel], owner: str, others: Mapping[str, type[BaseModel]]) -> str:
    names = setting_names(model)
    message = f"unknown setting {key!r}: expected one of {', '.join(names)}"
    having = [method for method, other in others.items() if other is not model and key in setting_names(other)]
    if having:
        return f"{message}; {key} is of --method {' and '.join(having)}, not of {owner}"
    near = _near(key, names)
    return f"{message}; did you mean {near}?" if near else message


def _near(key: str, names: list[str]) -> str | None:
    """By the whole name, or by its last part alone."""

    def plain(name: str) -> str:
        return name.casefold().replace("-", "").replace("_", "")

    for shorten in (lambda name: name, lambda name: name.rpartition(".")[2]):
        by_plain = {plain(shorten(name)): name for name in reversed(names)}
        close = difflib.get_close_matches(plain(shorten(key)), by_plain, n=1, cutoff=0.6)
        if close:
            return by_plain[close[0]]
    return None


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
