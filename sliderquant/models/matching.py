"""Whether the tensors of the files are those of the model class: by the rules of transformers, from headers alone."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights

from sliderquant.errors import InputError
from sliderquant.models.files import StoredTensor, opened

__all__ = ["empty_model", "matched", "same_values", "warn_once"]

logger = logging.getLogger(__name__)

_DTYPES = ("F16", "BF16", "F32")
_ROWS = 8192
# Old checkpoints hold these computed buffers; transformers passes them over in silence too.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


def empty_model(name: str, config: Any) -> Any:
    """The model class of `config` in fp32 without weights: parameters on the meta device, computed buffers on the CPU.

    Raises:
        InputError: transformers cannot build a model of this configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            # from_config writes the dtype into the configuration that it is given.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever a model class raises at values that it does not expect
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: transformers cannot build the model of this config.json: {type(error).__name__}: {reason}"
        ) from error
    return model


def matched(
    name: str, model: Any, found: Mapping[str, StoredTensor], embedding: str, head: str
) -> tuple[dict[str, StoredTensor], bool]:
    """Find every tensor of a model class among those of the files.

    Names without the prefix of the base model (`layers.0...` for `model.layers.0...`) count as those with it. Tensors
    that the class does not have are passed over, which a warning says once.

    Args:
        name: what the user called the model.
        model: of `empty_model`.
        embedding, head: names of the two weights that `tie_word_embeddings` makes one.

    Returns:
        by the name in the class, each tensor that is to be read, in the order of the class: the embedding, under
        whatever name it is stored, and the head unless it is tied; and whether the head is tied. It is not where the
        files hold a head with other values, whatever the configuration says.

    Raises:
        InputError: a tensor is missing, has another shape than the class gives it, or is not in 16 or 32 bits.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors = {}
    for key in expected:
        stored_as = [other for other in _names(key, model.base_model_prefix) if other in found]
        if len(stored_as) > 1 and not same_values(found[stored_as[0]], found[stored_as[1]]):
            raise InputError(
                f"{name}: the files hold {stored_as[0]} and {stored_as[1]}, two names of one tensor, with different "
                "values: remove the one that is not the model's"
            )
        if stored_as:
            tensors[key] = found[stored_as[0]]
    _check_headers(name, tensors, expected)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and head in tensors and embedding in tensors:
        tied = same_values(tensors[head], tensors[embedding])
        if not tied:
            warn_once(
                f"{name}: config.json ties the head to the embedding, but the files hold a head with other values: "
                "that head is used, and the checkpoint says that they are not tied"
            )
    elif tied and head in tensors:
        tensors[embedding] = tensors[head]  # one tensor, stored under the name of the head
    missing = [key for key in expected if key not in tensors and not (tied and key == head)]
    if missing:
        raise InputError(f"{name}: {_missing(missing, found, head)}")
    used = {tensor.key for tensor in tensors.values()}
    extra = [key for key in found if key not in used and not _COMPUTED.search(key)]
    if extra:
        warn_once(f"{name}: {_some(extra)} not part of {type(model).__name__}, ignored")
    return {key: tensors[key] for key in expected if not (tied and key == head)}, tied


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same shape and values, read some rows at a time."""
    if one.shape != other.shape:
        return False
    with opened(one.file) as first, opened(other.file) as second:
        left, right = first.get_slice(one.key), second.get_slice(other.key)
        return all(
            torch.equal(left[start : start + _ROWS].float(), right[start : start + _ROWS].float())
            for start in range(0, one.shape[0], _ROWS)
        )


def _names(key: str, prefix: str) -> Iterable[str]:
    """Names that a tensor may be stored under, the best first: as transformers adds and removes the base's prefix."""
    yield key
    if key.startswith(f"{prefix}."):
        yield key.removeprefix(f"{prefix}.")
    yield f"{prefix}.{key}"


def _check_headers(name: str, tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            wide = tensor.dtype == "F64"
            advice = "convert the model" if wide else "the model is quantized already; give the original"
            raise InputError(
                f"{name}: tensor {tensor.key} is stored as {tensor.dtype} ({tensor.file.name}); expected float16, "
                f"bfloat16 or float32: {advice}"
            )
        if tensor.shape != expected[key]:
            raise InputError(
                f"{name}: tensor {tensor.key} has shape {list(tensor.shape)} ({tensor.file.name}), but config.json "
                f"makes it {list(expected[key])}: files and config.json are not of the same model"
            )


def _missing(missing: list[str], found: Mapping[str, StoredTensor], head: str) -> str:
    """What is missing, and what may be the reason."""
    message = f"{_some(missing)} missing from the safetensors files"
    if missing == [head]:
        return (
            f"{message}, and config.json does not tie the head to the embedding: if they are one tensor, set "
            "tie_word_embeddings to true in config.json; otherwise copy or download the model again"
        )
    # Of a compiled, wrapped or adapted model: base_model.model.model.norm.weight, _orig_mod.model.norm.weight.
    longer = next((key for key in found if key.endswith(f".{missing[0]}")), None)
    if longer is not None:
        prefix = longer.removesuffix(missing[0])
        return (
            f"{message}, which hold {longer}: saved from a model that was wrapped or compiled; save the model itself, "
            f"or rename the tensors without {prefix!r}"
        )
    return f"{message}: they are not those of config.json, or an incomplete copy; copy or download the model again"


def _some(keys: list[str]) -> str:
    if len(keys) == 1:
        return f"tensor {keys[0]} is"
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"tensors {', '.join(keys[:3])}{more} are"


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """A warning, once in a process: a run opens the same model several times."""
    logger.warning(message)
