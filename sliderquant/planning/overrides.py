"""Settings by name, as a user gives them: a YAML file and `key=value` assignments."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sliderquant.calibration.files import decoded
from sliderquant.errors import InputError

__all__ = ["merged", "nested", "parse_overrides"]


class _Twice(Exception):
    """A key stands twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `010` is ten, `1e-3` a number, `1:30`, `no` and `off` strings. A key stands once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if seen.setdefault(key.value if isinstance(key, yaml.ScalarNode) else id(key), line) != line:
                raise _Twice(f"line {line}: {key.value!r} stands in line {seen[key.value]} already: keep one")
        return super().construct_mapping(node, deep)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+.0123456789"],
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_overrides(config: Path | None, assignments: list[str]) -> dict[str, Any]:
    """Nested overrides from a YAML file and from `key=value` assignments, which win over the file.

    Raises:
        InputError: the file is missing or not a mapping, or an assignment has no `=`; one setting is given two values.
    """
    overrides: dict[str, Any] = {}
    if config is not None:
        try:
            overrides = nested(_from_file(config), f"--config {config}")
        except RecursionError as error:  # of an alias inside its own anchor, or of brackets
            raise InputError(f"--config {config}: mappings without an end, or nested too deeply") from error
    assigned: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {assignment!r}: expected key=value, for example epochs=10 or windows.shallow=2")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise InputError(f"--set {assignment!r}: the value cannot be read") from error
        except _Twice as error:
            raise InputError(f"--set {assignment!r}: {error}") from None
        assigned = _united(assigned, nested({key.strip(): value}, f"--set {assignment!r}"), "--set", "")
    return merged(overrides, assigned)


def nested(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With `windows: {shallow: 2}` for `windows.shallow: 2`, wherever a name has dots.

    Raises:
        InputError: a name is not a string, or two values are given to one setting.
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str):
            raise InputError(f"{where}: {key!r} is not the name of a setting: expected a string such as epochs")
        inner: Any = nested(value, where) if isinstance(value, Mapping) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        result = _united(result, inner, where, "")
    return result


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what is in `overrides`, mapping by mapping."""
    result = dict(base)
    for key, value in overrides.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def _united(first: dict[str, Any], second: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """Both; a setting that is in both must have the same value."""
    result = dict(first)
    for key, value in second.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            result[key] = _united(dict(inner), value, where, f"{prefix}{key}.")
        elif key in result and (inner != value or isinstance(inner, bool) != isinstance(value, bool)):
            if isinstance(inner, Mapping) or isinstance(value, Mapping):
                raise InputError(f"{where}: {prefix}{key} is given as a value, and with settings of its own: keep one")
            raise InputError(f"{where}: {prefix}{key} is given twice, as {inner!r} and as {value!r}: keep one")
        else:
            result[key] = value
    return result


def _from_file(config: Path) -> Mapping[str, Any]:
    where = f"--config {config}"
    try:
        content = config.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); expected a YAML file") from error
    try:
        loaded = yaml.load(decoded(where, content), _Loader)
    except InputError:
        raise
    except _Twice as error:
        raise InputError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        if "'\\t'" in str(error):
            raise InputError(f"{where}: a tab{line}: YAML is indented by spaces") from error
        raise InputError(f"{where}: not valid YAML{line}: {' '.join(str(error).split())[:300]}") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    if loaded is None:
        raise InputError(f"{where}: no settings in it: expected a mapping of settings such as `epochs: 10`")
    if not isinstance(loaded, dict):
        kind = "a list" if isinstance(loaded, list) else "one value"
        raise InputError(f"{where}: expected a mapping of settings such as `epochs: 10`, not {kind}")
    return loaded
