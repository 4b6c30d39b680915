"""`quantization_config` in config.json: which linears are quantized, and how."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils.match import match_name, match_targets
from pydantic import ValidationError

from sliderquant._version import __version__
from sliderquant.checkpoint.packing import INT8, PACKED
from sliderquant.errors import CheckpointError, InputError
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import ACTIVATION_BITS, BITS, GROUP_SIZES, KV_BITS, Scheme
from sliderquant.setting_errors import reasons

__all__ = ["FORMAT_VERSION", "Entry", "SchemeLookup", "quantization_config", "read_entry", "sliderquant_entry"]

FORMAT_VERSION = 1
"""Of what sliderquant adds to the format of compressed-tensors; a reader refuses a larger one."""

_FORMATS = {
    CompressionFormat.pack_quantized.value: PACKED,
    CompressionFormat.int_quantized.value: INT8,
    CompressionFormat.naive_quantized.value: INT8,  # of integers: the same by another name
}
_MIXED = CompressionFormat.mixed_precision.value
_OTHERS_METHOD, _OWN_METHOD = "compressed-tensors", "sliderquant"
_FIELDS = {
    "weights": ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"),
    "input_activations": ("num_bits", "type", "symmetric", "strategy", "dynamic"),
}
_SUPPORTED = (
    f"sliderquant reads {PACKED} and {INT8} with int weights of {', '.join(map(str, BITS))} bits, one scale per "
    f"output channel or per group of {', '.join(map(str, GROUP_SIZES))}, and input activations that are not "
    f"quantized, or to int of {' or '.join(str(bits) for bits in ACTIVATION_BITS if bits < 16)} bits, dynamic, per "
    "token"
)


class Entry(NamedTuple):
    """What a model does while it runs that `quantization_config` does not say.

    Attributes:
        rotations: what the weights were rotated by; None: nothing.
        kv_bits: bits of queries, keys and values; 16: not quantized.
        clipped: whether the checkpoint holds a clipping for the ranges of all that is rounded while the model runs.
    """

    rotations: Rotations | None = None
    kv_bits: int = 16
    clipped: bool = False

    @property
    def own(self) -> bool:
        """Whether other readers would leave something out, and have to refuse the checkpoint."""
        return self.kv_bits < 16 or self.clipped or (self.rotations is not None and bool(self.rotations.online))


def sliderquant_entry(rotations: Rotations | None = None, kv_bits: int = 16, clipped: bool = False) -> dict[str, Any]:
    """The top-level key `sliderquant` of config.json. transformers and vLLM carry unknown keys of a model's
    configuration along; inside `quantization_config` they may refuse them."""
    entry: dict[str, Any] = {"format_version": FORMAT_VERSION, "version": __version__}
    if rotations is not None:
        entry["rotations"] = rotations.to_dict()
    if kv_bits < 16:
        # Queries, keys and values, each head of each token to a grid of its own.
        entry["attention"] = {"bits": kv_bits, "symmetric": False}
    if clipped:
        entry["activation_clipping"] = True
    return entry


def read_entry(config: Mapping[str, Any], where: str) -> Entry:
    """What the key `sliderquant` of a config.json describes.

    Raises:
        CheckpointError: the description is damaged, or does not fit the `quant_method`; the message starts with
            `where`.
    """
    entry = config.get("sliderquant") or {}
    described = entry.get("rotations") if isinstance(entry, Mapping) else None
    if described is not None and not isinstance(described, Mapping):
        raise CheckpointError(f"{where}: sliderquant.rotations is {described!r}, expected a JSON object")
    try:
        rotations = None if described is None else Rotations.from_dict(described)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: sliderquant.{error}") from error
    kv_bits = _attention_bits(entry.get("attention") if isinstance(entry, Mapping) else None, where)
    clipped = entry.get("activation_clipping", False) if isinstance(entry, Mapping) else False
    if not isinstance(clipped, bool):
        raise CheckpointError(f"{where}: sliderquant.activation_clipping is {clipped!r}, expected true or false")
    found = Entry(rotations, kv_bits, clipped)
    method = config["quantization_config"].get("quant_method")
    if found.own != (method == _OWN_METHOD):
        raise CheckpointError(
            f"{where}: quant_method is {method!r}, but sliderquant describes "
            f"{'rotations, roundings or clippings' if found.own else 'none'} that are computed while the model runs"
        )
    return found


def _attention_bits(described: Any, where: str) -> int:
    if described is None:
        return 16
    expected = [{"bits": bits, "symmetric": False} for bits in KV_BITS if bits < 16]
    if described not in expected:
        raise CheckpointError(
            f"{where}: sliderquant.attention is {described!r}, expected {' or '.join(map(str, expected))}"
        )
    return described["bits"]


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str], online: bool = False) -> dict[str, Any]:
    """Build `quantization_config`.

    Args:
        schemes: the scheme of every quantized linear, by module name.
        ignore: module names of the linears that are not quantized.
        online: the model rotates, rounds or clips, while it runs, what other readers would not: they shall refuse it.
    """
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    # One scheme goes by the class, as other tools write it; readers do not agree on what wins when a class and a name
    # both match, so two schemes go by names alone.
    groups = {
        f"group_{index}": QuantizationScheme(
            targets=["Linear"] if len(members) == 1 else names,
            weights=QuantizationArgs(
                num_bits=scheme.bits,
                type=QuantizationType.INT,
                symmetric=scheme.symmetric,
                strategy=QuantizationStrategy.CHANNEL if scheme.group_size is None else QuantizationStrategy.GROUP,
                group_size=scheme.group_size,
                dynamic=False,
            ),
            input_activations=_input_activations(scheme),
            format=CompressionFormat(scheme.stored_format),
        )
        for index, (scheme, names) in enumerate(members.items())
    }
    built = QuantizationConfig(
        config_groups=groups,
        format=_outer_format(scheme.stored_format for scheme in members),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    dumped = {key: value for key, value in built.model_dump(mode="json").items() if value is not None}
    for group in dumped["config_groups"].values():
        # What else there is has no meaning here, and depends on the version of compressed-tensors.
        for role, fields in _FIELDS.items():
            if group[role] is not None:
                group[role] = {key: value for key, value in group[role].items() if key in fields}
    if online:
        dumped["quant_method"] = _OWN_METHOD
    return dumped


class SchemeLookup:
    """Which scheme `quantization_config` gives to a linear; for checkpoints of sliderquant and of other tools.

    Raises:
        CheckpointError: the configuration is not one that sliderquant reads; the message starts with `where`.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        method = config.get("quant_method")
        if method not in (_OTHERS_METHOD, _OWN_METHOD):
            raise CheckpointError(f"{where}: quant_method is {method!r}, expected {_OTHERS_METHOD!r}. {_SUPPORTED}")
        try:
            parsed = QuantizationConfig.model_validate({**config, "quant_method": _OTHERS_METHOD})
        except ValidationError as error:
            raise CheckpointError(
                f"{where}: not a quantization_config of compressed-tensors: {reasons(error)}; the model has to be "
                "quantized again so"
            ) from error
        except (ValueError, TypeError, NotImplementedError) as error:
            raise CheckpointError(f"{where}: not a quantization_config of compressed-tensors: {error}") from error
        if parsed.quantization_status != QuantizationStatus.COMPRESSED:
            raise CheckpointError(
                f"{where}: quantization_status is {parsed.quantization_status.value!r}, expected 'compressed': the "
                "weights were not packed when this folder was saved"
            )
        if parsed.kv_cache_scheme is not None:
            raise CheckpointError(f"{where}: kv_cache_scheme: a quantized KV cache is not supported; {_SUPPORTED}")
        if config.get("transform_config"):
            raise CheckpointError(f"{where}: transform_config: online rotations are not supported; {_SUPPORTED}")
        self._config, self._parsed = config, parsed
        self._ignore = parsed.ignore or []
        _check_patterns(self._ignore, f"{where}: ignore")
        self._groups: dict[str, tuple[list[str], Scheme, str]] = {}
        for key, group in parsed.config_groups.items():
            assert isinstance(group, QuantizationScheme)  # preset names are resolved by the library's validator
            _check_patterns(group.targets, f"{where}: config_groups.{key}.targets")
            self._groups[key] = (group.targets, *_read_group(group, parsed.format, f"{where}: config_groups.{key}"))
        if not self._groups:
            raise CheckpointError(f"{where}: config_groups is empty, expected one group or more")
        # The library tells a class name from a module name by looking at a module.
        self._linear = torch.nn.Linear(1, 1, device="meta")

    @property
    def explicit_names(self) -> list[str]:
        """Targets that are neither class names nor patterns: linears that must be there."""
        targets = [target for names, _, _ in self._groups.values() for target in names]
        return [target for target in targets if "." in target and not target.startswith("re:")]

    def find(self, name: str) -> Scheme | None:
        """The scheme of the linear `name`; None: it is not to be quantized."""
        found = self._find(name)
        return None if found is None else found[0]

    def format_of(self, name: str) -> str | None:
        """The format that the linear `name` is stored in, `packing.PACKED` or `INT8`; None: it is not quantized."""
        found = self._find(name)
        return None if found is None else found[1]

    @property
    def as_written(self) -> dict[str, Any]:
        """The configuration, with every group in the format that sliderquant writes its scheme in: what describes the
        `state_dict` of the loaded model."""
        formats = {key: scheme.stored_format for key, (_, scheme, _) in self._groups.items()}
        if all(stored == formats[key] for key, (_, _, stored) in self._groups.items()):
            return dict(self._config)
        given = self._config["config_groups"]
        # A group may be no more than a list of targets, by the name of a preset.
        groups = {
            key: dict(given[key]) if isinstance(given.get(key), Mapping) else group.model_dump(mode="json")
            for key, group in self._parsed.config_groups.items()
            if isinstance(group, QuantizationScheme)
        }
        groups = {key: {**group, "format": formats[key]} for key, group in groups.items()}
        return {**self._config, "format": _outer_format(formats.values()), "config_groups": groups}

    def _find(self, name: str) -> tuple[Scheme, str] | None:
        if any(match_name(name, pattern) or pattern == "Linear" for pattern in self._ignore):
            return None
        every_target = [target for targets, _, _ in self._groups.values() for target in targets]
        matches = match_targets(name, self._linear, every_target)
        if not matches:
            return None
        return next((scheme, stored) for targets, scheme, stored in self._groups.values() if matches[0] in targets)


def _check_patterns(names: Iterable[str], where: str) -> None:
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise CheckpointError(f"{where}: {name!r} is not a regular expression: {error}") from error


def _outer_format(formats: Iterable[str]) -> str:
    """Of a whole model, from those of its groups."""
    different = set(formats)
    return different.pop() if len(different) == 1 else _MIXED


def _read_group(group: QuantizationScheme, outer_format: str, where: str) -> tuple[Scheme, str]:
    """The scheme of a group, and the format that it is stored in."""
    named = getattr(group.format, "value", group.format) or outer_format
    if named not in _FORMATS:
        raise CheckpointError(f"{where}.format is {named!r}, expected {PACKED!r} or {INT8!r}. {_SUPPORTED}")
    stored = _FORMATS[named]
    if group.output_activations is not None:
        raise CheckpointError(f"{where}.output_activations: quantized outputs are not supported; {_SUPPORTED}")
    weights, activations = group.weights, group.input_activations
    if activations is not None and (
        activations.type != QuantizationType.INT.value
        or activations.strategy != QuantizationStrategy.TOKEN.value
        or activations.dynamic is not True
    ):
        raise CheckpointError(f"{where}.input_activations: expected dynamic integers per token; {_SUPPORTED}")
    if weights is None or weights.type != QuantizationType.INT.value or weights.dynamic:
        raise CheckpointError(f"{where}.weights: expected static integer weights; {_SUPPORTED}")
    if weights.strategy not in (QuantizationStrategy.GROUP.value, QuantizationStrategy.CHANNEL.value):
        raise CheckpointError(f"{where}.weights.strategy is {weights.strategy!r}, expected 'group' or 'channel'")
    grouped = weights.strategy == QuantizationStrategy.GROUP.value
    try:
        scheme = Scheme(weights.num_bits, weights.group_size if grouped else None, weights.symmetric)
    except InputError as error:
        raise CheckpointError(
            f"{where}.weights: {weights.num_bits} bits, group_size {weights.group_size} is not supported; {_SUPPORTED}"
        ) from error
    if activations is None:
        return scheme, stored
    try:
        bits, symmetric = activations.num_bits, activations.symmetric
        return replace(scheme, activation_bits=bits, activation_symmetric=symmetric), stored
    except InputError as error:
        raise CheckpointError(
            f"{where}.input_activations: {activations.num_bits} bits with weights of {weights.num_bits} bits, "
            f"group_size {weights.group_size}, symmetric {weights.symmetric}, is not supported: {error}"
        ) from error


def _input_activations(scheme: Scheme) -> QuantizationArgs | None:
    if not scheme.quantizes_activations:
        return None
    return QuantizationArgs(
        num_bits=scheme.activation_bits,
        type=QuantizationType.INT,
        symmetric=scheme.activation_symmetric,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
