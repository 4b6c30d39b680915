"""A checkpoint folder to a transformers model that runs on packed weights.

The model is built without weights; every tensor then goes from the file to the device and, if it belongs to a quantized
linear, into the layout of that device. Linears that read the same input become one packed weight. No dense copy of a
quantized weight is ever made: the peak is the packed model plus the codes of one such weight.
"""

import ctypes
import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sliderquant.checkpoint.clips import Clip, clip_from
from sliderquant.checkpoint.packing import INPUT_CLIP, PARTS, unpack
from sliderquant.checkpoint.reader import Checkpoint, read_checkpoint
from sliderquant.checkpoint.skeleton import attention_clips, build_skeleton, check_against_model, plain_config
from sliderquant.decoding import attach_decode_runner
from sliderquant.devices import resolve_device
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models import family_of, family_of_class
from sliderquant.models.layer import model_layers
from sliderquant.modules.attention import AttentionRounding, round_attention
from sliderquant.modules.fused import fuse_layers
from sliderquant.modules.head import keep_head_fast
from sliderquant.modules.linear import PackedLinear
from sliderquant.modules.merged import MergedLinear, can_merge, concatenate, shared_inputs
from sliderquant.modules.rotated import insert_rotations
from sliderquant.quantizer.grids import QuantizedWeight

__all__ = ["load", "make_fast"]

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    attn_implementation: str | None = None,
    merge: bool = True,
    warm_up: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint: of sliderquant, or of another tool in compressed-tensors' formats
    `pack-quantized` and `int-quantized`.

    Args:
        path: the checkpoint folder.
        device: `"auto"` (a GPU when there is one), `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        dtype: of scales, activations and all that is not quantized: `"auto"`, `"float32"`, `"bfloat16"` or
            `"float16"`. `"auto"` is the dtype of the original model, which config.json names; a float16 model runs in
            bfloat16 on a CPU, where float16 is slow. The codes stay as they are.
        attn_implementation: as in transformers: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
        merge: pack q_proj, k_proj and v_proj as one weight, and gate_proj and up_proj: one kernel launch each. The
            modules keep their places and `state_dict` its tensors; `sliderquant.modules.split_linears` undoes it.
        warm_up: on CUDA, compile the kernels now, in parallel, and not when they are first launched; see
            `sliderquant.warm_up`.

    Returns:
        The model in evaluation mode, without gradients; `generate`, `save_pretrained` and `torch.compile` work on it.
        On CUDA `generate` replays one CUDA graph per token (`sliderquant.decoding`); `disable_compile=True` in its
        generation config turns that off.

    Raises:
        InputError: the folder, device or dtype is not usable.
        CheckpointError: the checkpoint is damaged, incomplete or inconsistent; see also `verify`.
    """
    target = resolve_device(device)
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path {path!r}: expected the folder of a checkpoint, a string or a path")
    checkpoint = read_checkpoint(path)
    where = str(checkpoint.path)
    config = plain_config(checkpoint.config, where)
    wanted = _resolve_dtype(dtype, checkpoint, target)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = build_skeleton(config, where, wanted, **kwargs)
    absent = check_against_model(checkpoint, model)

    _fill_dense(model, checkpoint, target, wanted)
    _fill_packed(model, checkpoint, target, wanted, merge)
    _insert_what_runs(model, checkpoint, where)
    if isinstance(head := model.get_output_embeddings(), nn.Linear):
        keep_head_fast(head)
    packed = {f"{name}.weight" for name in checkpoint.schemes}
    if packed & model.all_tied_weights_keys.keys():
        # A packed output head is not the embedding, whatever the configuration says.
        model.config.tie_word_embeddings = False
        kept = {key: source for key, source in model.all_tied_weights_keys.items() if key not in packed}
        model.all_tied_weights_keys = kept
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and not isinstance(module, PackedLinear):
                module._buffers[name] = buffer.to(target)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"{where}: no value for {', '.join(left[:3])}: the checkpoint is incomplete")

    _read_generation_config(model, checkpoint)
    # For save_pretrained: the state_dict of the packed layers is what this configuration describes.
    model.config.quantization_config = checkpoint.lookup.as_written
    if checkpoint.rotations is not None or checkpoint.kv_bits < 16 or checkpoint.clipped:
        model.config.sliderquant = checkpoint.config["sliderquant"]
    model.config._name_or_path = model.name_or_path = where
    model.config.dtype = wanted  # Older transformers leave what the checkpoint says, where a dtype was asked for.
    model.requires_grad_(False).eval()
    if target.type == "cuda":
        make_fast(model)
    if warm_up:
        from sliderquant.warming import warm_up as compile_all

        for line in compile_all(model).errors:
            logger.warning("%s", line)
    return model


def make_fast(model: PreTrainedModel) -> None:
    """What a model on a GPU gains from besides packed weights: fused layers, and a CUDA graph per token in `generate`.

    A model of a family that is not known stays as it is.
    """
    family = family_of_class(model)
    if family is not None:
        fuse_layers(model, family)
        attach_decode_runner(model)


def _read_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take over generation_config.json; as in transformers, one that cannot be read is no reason not to load."""
    if not (checkpoint.path / "generation_config.json").is_file() or not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        _say_once(f"{checkpoint.path / 'generation_config.json'} cannot be read and is ignored: {reason}")


def _resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return _dtype_named(dtype)
    stored = checkpoint.dtype
    if stored == torch.float16 and device.type == "cpu":
        _say_once(
            f"{checkpoint.path} is stored in float16, which has no fast kernels on a CPU: it runs in bfloat16; "
            'dtype="float16" runs it in float16 all the same'
        )
        return torch.bfloat16
    rounds = any(scheme.quantizes_activations for scheme in checkpoint.schemes.values())
    if stored == torch.float32 and device.type == "cpu" and not rounds:
        _say_once(
            f"{checkpoint.path} is stored in float32, in which a CPU multiplies dense weights: it takes the memory of "
            'the original; dtype="bfloat16" runs it on packed weights'
        )
    return stored


def _dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is not supported: expected auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    logger.warning(message)


def _fill_dense(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Read all that is not quantized; the biases of quantized linears too."""
    by_file = defaultdict(list)
    packed = {f"{name}.{part}" for name in checkpoint.schemes for part in (*PARTS, INPUT_CLIP)}
    packed.update(attention_clips(checkpoint, model))
    for key, stored in checkpoint.tensors.items():
        if key not in packed:
            by_file[stored.file].append(key)
    for path, keys in by_file.items():
        with safe_open(path, framework="pt") as file:
            for key in keys:
                module_name, _, name = key.rpartition(".")
                try:
                    module = model.get_submodule(module_name)
                except AttributeError:
                    continue  # a computed buffer of an old checkpoint: check_against_model let it pass
                # A copy: a view of the file would be pulled from under the model when the file changes.
                value = file.get_tensor(key)
                if value.is_floating_point():
                    _check_finite(value, key, path)
                    value = value.to(device, _kept_dtype(model, key, dtype), copy=True)
                else:
                    value = value.to(device, copy=True)
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
                elif name in module._buffers and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = value


def _check_finite(value: Tensor, key: str, path: Path) -> None:
    # aminmax passes NaN on, and takes no memory; isfinite takes thirty times as long.
    if value.numel() and not all(math.isfinite(end) for end in value.aminmax()):
        raise CheckpointError(
            f"{path}: tensor {key} holds values that are not finite: the file is damaged, or the model was; copy or "
            "download it again"
        )


def _kept_dtype(model: PreTrainedModel, key: str, dtype: torch.dtype) -> torch.dtype:
    """transformers keeps some modules in fp32: those that a model lists, for fp16 or for any 16-bit dtype."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return torch.float32 if kept & set(key.split(".")) else dtype


def _insert_what_runs(model: PreTrainedModel, checkpoint: Checkpoint, where: str) -> None:
    """Insert the rotations and roundings that are computed while the model runs."""
    rotations, kv_bits = checkpoint.rotations, checkpoint.kv_bits
    if kv_bits == 16 and rotations is None:
        return
    try:
        family = family_of(where, model.config.model_type, [type(model).__name__])
        if rotations is not None:
            rotations.check_sizes([layer for layer, _ in model_layers(model, family)])
            insert_rotations(model, family, rotations)
        round_attention(model, family, kv_bits, rotations)
        for name in attention_clips(checkpoint, model):
            attention, _, part = name.rpartition(".")
            rounding = model.get_submodule(f"{attention}.rounding")
            assert isinstance(rounding, AttentionRounding)
            rounding.clips[part.removesuffix("_clip")] = _read_clip(checkpoint, name)
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _fill_packed(
    model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, merge: bool
) -> None:
    groups = shared_inputs(model) if merge else []
    merged = [names for names in groups if _can_merge(model, checkpoint, names, device, dtype)]
    group_of = {name: names for names in merged for name in names}
    for name in checkpoint.schemes:
        names = group_of.get(name, (name,))
        if name == names[0]:
            _fill_linears(model, checkpoint, names, device, dtype)
            _return_free_memory()


def _can_merge(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> bool:
    if not all(name in checkpoint.schemes for name in names):
        return False
    shapes = [checkpoint.linear_shapes[name] for name in names]
    biased = [model.get_submodule(name).bias is not None for name in names]
    clips = [_input_clip(checkpoint, name) for name in names]
    return can_merge(shapes, [checkpoint.schemes[name] for name in names], biased, device, dtype, clips)


def _fill_linears(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Put one linear, or several as one packed weight, into the model."""
    scheme = checkpoint.schemes[names[0]]
    biases = [model.get_submodule(name).bias for name in names]
    clip = _input_clip(checkpoint, names[0])
    try:
        quantized = _read_quantized(checkpoint, names, device, dtype)
        if len(names) == 1:
            model.set_submodule(names[0], PackedLinear(quantized, scheme, biases[0], dtype=dtype, input_clip=clip))
        else:
            sizes = [checkpoint.linear_shapes[name][0] for name in names]
            merged = MergedLinear(quantized, scheme, sizes, concatenate(biases), dtype=dtype, input_clip=clip)
            merged.attach(model, names)
    except ValueError as error:  # of unpacking, or of the kernels: a value that no quantizer writes
        if len(names) > 1:
            for name in names:  # the message shall name the one that holds it
                _fill_linears(model, checkpoint, (name,), device, dtype)
        where = f"{checkpoint.codes_of(names[0]).file}: layer {names[0]}"
        raise CheckpointError(f"{where} cannot be packed for {device} in {dtype}: {error}") from error


def _read_quantized(
    checkpoint: Checkpoint, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> QuantizedWeight:
    """The weights of one or more linears of one scheme, concatenated along the outputs, with scales in `dtype`."""
    scheme = checkpoint.schemes[names[0]]
    outputs = sum(checkpoint.linear_shapes[name][0] for name in names)
    # Filled in place: concatenating afterwards would hold the codes twice.
    codes = torch.empty(outputs, checkpoint.linear_shapes[names[0]][1], dtype=torch.uint8, device=device)
    scales, zero_points, start = [], [], 0
    for name in names:
        parts = {part: tensor.to(device) for part, tensor in _read_parts(checkpoint, name).items()}
        stop = start + checkpoint.linear_shapes[name][0]
        _, scale, zero_point = unpack(parts, scheme, codes[start:stop])
        scales.append(scale.to(dtype))
        zero_points.append(zero_point)
        start = stop
    return QuantizedWeight(codes, torch.cat(scales), concatenate(zero_points))


def _input_clip(checkpoint: Checkpoint, name: str) -> Clip | None:
    """That of a linear; None: there is none."""
    key = f"{name}.{INPUT_CLIP}"
    return _read_clip(checkpoint, key) if key in checkpoint.tensors else None


def _read_clip(checkpoint: Checkpoint, key: str) -> Clip:
    path = checkpoint.tensors[key].file
    with safe_open(path, framework="pt") as file:
        try:
            return clip_from(file.get_tensor(key), key)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _read_parts(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    # The file is opened for every linear: as long as it is open, what was read of it stays in memory. A linear may
    # straddle two files.
    stored = {part: found for part in PARTS if (found := checkpoint.tensors.get(f"{name}.{part}")) is not None}
    parts = {}
    for path in sorted({found.file for found in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for part, found in stored.items():
                if found.file == path:
                    parts[part] = file.get_tensor(f"{name}.{part}")
    return parts


def _return_free_memory() -> None:
    """glibc keeps what packing frees, in pieces between the packed weights: several times the size of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
