"""Perplexity of a checkpoint, or of an original model."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sliderquant.calibration.text import check_source, read_text
from sliderquant.calibration.tokens import vocabulary_of
from sliderquant.devices import resolve_device
from sliderquant.errors import InputError, SliderQuantError
from sliderquant.evaluation.perplexity import Perplexity, check_seqlen, evaluation_blocks, perplexity
from sliderquant.loading import load
from sliderquant.models.matching import empty_model
from sliderquant.models.source import ModelSource, open_model, read_tokenizer
from sliderquant.planning.arguments import check_arguments
from sliderquant.progress import Progress
from sliderquant.rotations.folded import RotatedSource

__all__ = ["evaluate", "evaluation_dtype", "is_quantized", "load_original", "original_perplexity"]


def evaluate(
    model: str | Path,
    perplexity_on: str = "wikitext2",
    seqlen: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a checkpoint of ours, or of an original model.

    Args:
        model: folder of a quantized checkpoint; or folder or hub id of an original model.
        perplexity_on: text, see `sliderquant.calibration.text`.
        seqlen: tokens per block; None: 2048, or the model's maximum when that is shorter.
        dtype: of the arithmetic; `"auto"`: the model's own on CUDA and float32 on the CPU.

    Raises:
        InputError: the model or the text is not usable.
        CheckpointError: the checkpoint is damaged.
    """
    check_arguments(locals())
    progress = progress or Progress()
    check_source(perplexity_on)
    perplexity_on = str(perplexity_on)
    target = resolve_device(device)
    folder = Path(model).expanduser()
    if is_quantized(folder):
        text = read_text(perplexity_on, "evaluation")  # loading takes longer
        if dtype == "auto" and target.type != "cuda":
            dtype = torch.float32
        tokenizer = read_tokenizer(folder, str(model))
        packed = load(folder, device=target, dtype=dtype)
        seqlen = check_seqlen(packed.config, seqlen)
        blocks = evaluation_blocks(text, tokenizer, seqlen, packed.get_input_embeddings().num_embeddings)
        _say(blocks.notes, progress)
        return _finite(perplexity(packed, tokenizer, perplexity_on, seqlen, progress.evaluated, blocks.tokens), model)
    source = open_model(model)
    measured = original_perplexity(source, source.tokenizer(), perplexity_on, seqlen, target, progress, dtype)
    return _finite(measured, model)


def _finite(measured: Perplexity, model: str | Path) -> Perplexity:
    if math.isfinite(measured.value):
        return measured
    advice = "values beyond those of float16: try --dtype float32; or " if measured.dtype == "float16" else ""
    raise SliderQuantError(
        f"{model}: the perplexity on {measured.dataset} is {measured.value}, so its logits are not finite: {advice}the "
        "weights are damaged, which `sliderquant inspect OUT --verify` shows of a checkpoint"
    )


def _say(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress.message(note)


def is_quantized(folder: Path) -> bool:
    """Whether the folder's config.json has a quantization configuration."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def original_perplexity(
    source: ModelSource,
    tokenizer: Any,
    text: str,
    seqlen: int | None,
    device: torch.device,
    progress: Progress,
    dtype: str | torch.dtype = "auto",
    blocks: torch.Tensor | None = None,
) -> Perplexity:
    """Perplexity of the model as it is on disk, from the tensors that are quantized; of a rotated one, before that.

    See `evaluate`; `blocks` as for `perplexity`.
    """
    if isinstance(source, RotatedSource):
        source = source.original
    if blocks is None:
        seqlen = check_seqlen(source.config, seqlen)
        found = evaluation_blocks(text, tokenizer, seqlen, vocabulary_of(source))
        blocks = found.tokens
        _say(found.notes, progress)
    wanted = evaluation_dtype(source.dtype, device) if dtype == "auto" else _dtype(dtype)
    original = load_original(source, device, wanted)
    return perplexity(original, tokenizer, text, seqlen, progress.evaluated, blocks)


def load_original(source: ModelSource, device: torch.device, dtype: str | torch.dtype = "auto") -> Any:
    """The model in transformers. Its files are not opened a second time by other rules than ours.

    Args:
        dtype: `"auto"`: that of its weights, and bfloat16 for float16 on a CPU, as `sliderquant.load` has it.
    """
    if dtype == "auto":
        slow = source.dtype == torch.float16 and device.type == "cpu"
        dtype = torch.bfloat16 if slow else source.dtype
    model_class = type(empty_model(source.name, source.config))
    weights = {name: source.tensor(name) for name in source.tensors}
    model = model_class.from_pretrained(None, config=source.config, state_dict=weights, dtype=_dtype(dtype))
    return model.to(device).eval()


def evaluation_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own dtype on CUDA. float32 on the CPU, where half precision saves little and costs digits."""
    return stored if device.type == "cuda" else torch.float32


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return found
