"""The model that a config.json describes, without its weights; and whether a checkpoint fills it."""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sliderquant.checkpoint.clips import ATTENTION_SITES
from sliderquant.checkpoint.packing import INPUT_CLIP
from sliderquant.checkpoint.reader import Checkpoint
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models import family_of
from sliderquant.models.layer import model_layers

__all__ = ["attention_clips", "build_skeleton", "check_against_model", "linear_names", "plain_config"]


def plain_config(config: dict[str, Any], where: str) -> PretrainedConfig:
    """The configuration of the model without its quantization and its dtype, which the caller settles.

    Raises:
        CheckpointError: the installed transformers does not know the model; the message starts with `where`.
    """
    # An implementation of attention that is named in a file may be code on the hub, which is never run.
    left = ("quantization_config", "sliderquant", "attn_implementation", "_attn_implementation", "dtype", "torch_dtype")
    # A copy: transformers writes into dictionaries that it is given, such as rope_scaling.
    plain = copy.deepcopy({key: value for key, value in config.items() if key not in left})
    model_type = plain.pop("model_type", None)
    if model_type is None:
        raise CheckpointError(f"{where}: config.json has no model_type")
    try:
        described = AutoConfig.for_model(model_type, **plain)
    except Exception as error:  # whatever a model's own validation raises
        raise CheckpointError(
            f"{where}: the installed transformers cannot read this config.json (model_type {model_type!r}): {error}"
        ) from error
    described.return_dict = True  # neither generate nor we read tuples
    return described


def build_skeleton(config: PretrainedConfig, where: str, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """Build the model with its parameters on the meta device and its computed buffers (rotary frequencies and the like,
    which no checkpoint holds) for real, on the CPU.

    Args:
        kwargs: for `AutoModelForCausalLM.from_config`.

    Raises:
        CheckpointError: transformers has no causal language model for this configuration.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **kwargs)
    except Exception as error:  # whatever a model class raises at values that it does not expect
        reason = " ".join(str(error).split())[:300]
        attention = kwargs.get("attn_implementation")
        if attention is not None and (isinstance(error, ImportError) or str(attention) in reason):
            raise InputError(f"attn_implementation {attention!r}: {reason}") from error
        raise CheckpointError(
            f"{where}: transformers cannot build the model of this config.json: {type(error).__name__}: {reason}"
        ) from error
    return model


def linear_names(model: nn.Module) -> list[str]:
    """The names of all `nn.Linear` modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def check_against_model(checkpoint: Checkpoint, model: PreTrainedModel) -> set[str]:
    """Check that the tensors of a checkpoint are those of the model, no more and no less, in its shapes.

    Args:
        model: dense, from `build_skeleton`.

    Returns:
        The names of the parameters that the checkpoint does not hold because they are tied to others.

    Raises:
        CheckpointError: naming the first of the tensors that are missing, unexpected or of another shape.
    """
    modules = dict(model.named_modules())
    for name, (out_features, in_features) in checkpoint.linear_shapes.items():
        file, module = checkpoint.codes_of(name).file, modules.get(name)
        if not isinstance(module, nn.Linear):
            kind = "no such layer" if module is None else f"a {type(module).__name__} there"
            raise CheckpointError(
                f"{file}: layer {name}: the model of config.json has {kind}, expected a linear (fused experts of "
                "mixture-of-experts models are not supported)"
            )
        if (module.out_features, module.in_features) != (out_features, in_features):
            raise CheckpointError(
                f"{file}: the weight of {name} is [{out_features}, {in_features}], but by config.json the layer is "
                f"[{module.out_features}, {module.in_features}]"
            )
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    packed = {f"{name}.weight" for name in checkpoint.schemes}
    dense = {key: stored for key, stored in checkpoint.tensors.items() if not _belongs(key, checkpoint.schemes)}
    expected |= dict.fromkeys(attention_clips(checkpoint, model), (2,))

    for key in linear_names(model):
        stored = dense.get(f"{key}.weight")
        if stored is not None and checkpoint.lookup.find(key) is not None:
            raise CheckpointError(
                f"{stored.file}: tensor {key}.weight is not packed, but config.json says that {key} is "
                f"{checkpoint.lookup.find(key)}"
            )
    for key, stored in dense.items():
        if key in expected and expected[key] != stored.shape:
            raise CheckpointError(
                f"{stored.file}: tensor {key} has shape {list(stored.shape)}, but by config.json it is "
                f"{list(expected[key])}"
            )
    unexpected = [key for key in dense if key not in expected and not _ignored(key, _ignored_unexpected(model))]
    if unexpected:
        raise CheckpointError(
            f"{dense[unexpected[0]].file}: {_some(unexpected)} not part of the model that config.json describes "
            f"({type(model).__name__})"
        )
    absent = expected.keys() - dense.keys() - packed
    # A tied tensor may be stored under either of its names.
    pairs = [{target, source} for target, source in model.all_tied_weights_keys.items()]
    tied = {key for pair in pairs if not pair <= absent for key in pair & absent}
    missing = sorted(absent - tied)
    if missing:
        raise CheckpointError(f"{checkpoint.path}: {_some(missing)} missing: the checkpoint is incomplete")
    return tied


def attention_clips(checkpoint: Checkpoint, model: PreTrainedModel) -> list[str]:
    """The names of the tensors with the clipping of queries, keys and values, layer by layer; none without."""
    if not checkpoint.clipped or checkpoint.kv_bits == 16:
        return []
    try:
        family = family_of(str(checkpoint.path), model.config.model_type, [type(model).__name__])
    except InputError as error:
        raise CheckpointError(str(error)) from error
    prefixes = [layer.full(layer.attention.module) for layer, _ in model_layers(model, family)]
    return [f"{prefix}.{site}_clip" for prefix in prefixes for site in ATTENTION_SITES]


def _belongs(key: str, schemes: Iterable[str]) -> bool:
    name, _, part = key.rpartition(".")
    return name in schemes and (part.startswith("weight") or part == INPUT_CLIP)


def _ignored_unexpected(model: PreTrainedModel) -> list[str]:
    # Old checkpoints hold these computed buffers; transformers skips them too.
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]


def _ignored(key: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


def _some(keys: list[str]) -> str:
    if len(keys) == 1:
        return f"tensor {keys[0]} is"
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"tensors {', '.join(keys[:3])}{more} are"
