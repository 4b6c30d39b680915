"""A step of `generate` as a CUDA graph.

transformers runs a step of the model from Python, some hundred launches that take longer than what they launch. Here
the first token of a generation runs as always; then the step is captured over buffers that do not move
(`sliderquant.decoding.cache`), and each further token is one replay. transformers keeps its loop: sampling, stopping
criteria and streamers see what they always see.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sliderquant.decoding.attention import attend_over
from sliderquant.decoding.cache import BoundLayer, Slot, length_for, release
from sliderquant.models import family_of, family_of_class
from sliderquant.modules.attention import cache_keyword
from sliderquant.modules.fused import fused_rotary

__all__ = ["DecodeRunner", "attach_decode_runner", "count_hooks"]

logger = logging.getLogger(__name__)

# Sequences: beyond these a step is no longer bound by the host.
MAX_BATCH = 64
# A graph takes as long to capture as about one step takes without; for fewer steps there is nothing to be had.
FEWEST_STEPS = 3
# Buffers that are kept between generations, all together, as a part of the GPU's memory.
KEPT_SHARE = 0.03


@dataclass
class _Graph:
    """A captured step: what replays it, and where it leaves its logits `[batch, 1, vocabulary]`."""

    replay: Callable[[], None]
    logits: Tensor


@dataclass
class _Generation:
    """One call of `generate`.

    Attributes:
        max_length, max_new_tokens: of its generation config; with embeddings for a prompt the first leaves that out.
        taken: False: its remaining steps run without graphs.
    """

    max_length: int
    max_new_tokens: int
    taken: bool = True

    def steps_after(self, tokens: int) -> int:
        """The steps that are left at most, with so many tokens in the cache."""
        return max(self.max_length - tokens, self.max_new_tokens) - 1


def capture_on_cuda(step: Callable[[], Tensor]) -> _Graph:
    """Capture a step that has run before, on the current device. Raises what the capture raises."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: the one that torch keeps for captures belongs to the device of the first. Other threads
    # of the process may go on using the GPU.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        logits = step()
    return _Graph(graph.replay, logits)


class DecodeRunner:
    """Takes over the steps of a model's `generate`; whatever it does not take, transformers runs as always.

    It takes greedy decoding and sampling on one CUDA device with the default cache and `sdpa` attention. It leaves
    beams, assisted decoding, outputs of attentions or hidden states, `disable_compile=True`, other caches, tokens
    beyond a sliding window, and models with hooks that were added after it. A graph reads the model's tensors where
    they are; what else changes on a module after a graph was captured, it does not see.

    Attributes:
        slots: the buffers of generations, those that run and those that are kept for the next one.
    """

    slots: list[Slot]

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: int,
        capture: Callable[[Callable[[], Tensor]], _Graph] = capture_on_cuda,
    ) -> None:
        """
        Args:
            model: of one of our families; held weakly.
            hooks: what `count_hooks` finds on the model; with more of them, transformers runs as always.
            capture: makes a graph of a step that has run.
        """
        # The model holds its runner: memory of a model that is deleted would wait for the garbage collector.
        self._model, self._hooks, self._capture = weakref.ref(model), hooks, capture
        self._keyword = cache_keyword(type(model).forward)
        self._family = family_of(type(model).__name__, None, [type(model).__name__])
        self._lock = threading.RLock()
        self.slots = []
        self._fingerprint: tuple[int, ...] = ()
        self._refused = False
        self._next = threading.local()

    @property
    def model(self) -> PreTrainedModel:
        """The model that it runs."""
        model = self._model()
        assert model is not None
        return model

    # What transformers asks before a generation, and calls in its loop.

    def valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """In place of the method of `GenerationMixin`: whether `get_compiled_call` is to be used."""
        model = self.model
        self._next.generation = None
        if not self._takes(model_kwargs, generation_config):
            return type(model)._valid_auto_compile_criteria(model, model_kwargs, generation_config)
        config = generation_config
        self._next.generation = _Generation(config.max_length or 0, config.max_new_tokens or 0)
        fingerprint = _fingerprint(model)
        with self._lock:
            if fingerprint != self._fingerprint:
                self.slots, self._fingerprint = [], fingerprint
        return True

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """In place of the method of `PreTrainedModel`: right after it was asked whether that is to be used."""
        generation = getattr(self._next, "generation", None)
        self._next.generation = None
        if generation is not None:
            return partial(self._step, generation)
        return type(self.model).get_compiled_call(self.model, compile_config)

    def _step(self, generation: _Generation, **inputs: Any) -> Any:
        """The model's forward for the next token, by a graph where that is possible."""
        cache = inputs.get(self._keyword)
        if not _is_plain_step(inputs, self._keyword) or type(cache) is not DynamicCache:
            # Several tokens at once, as assisted decoding has them: it takes some of them back, step after step.
            generation.taken = False
        slot = None
        if generation.taken and not self._refused:
            assert isinstance(cache, DynamicCache)
            slot = self._slot_of(cache, generation, inputs.get("attention_mask"))
        if slot is None:
            return self.model(**inputs)
        slot.ids.copy_(inputs["input_ids"])
        positions = inputs.get("position_ids")
        if positions is None:
            slot.positions.fill_(slot.length)
        else:
            slot.positions.copy_(positions)
        logits = self._run(slot, generation)
        return self._output(logits=logits, **{self._keyword: cache})

    def _takes(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        model: PreTrainedModel = self.model
        cache: Any = model_kwargs.get(self._keyword)
        return not (
            self._refused
            or generation_config.disable_compile
            or generation_config.compile_config is not None
            or generation_config.num_beams > 1
            or generation_config.is_assistant
            or generation_config.prompt_lookup_num_tokens
            or generation_config.output_attentions
            or generation_config.output_hidden_states
            or generation_config.prefill_chunk_size is not None
            or type(cache) is not DynamicCache
            or cache.offloading
            or not model_kwargs.get("use_cache", True)
            or model.training
            or model.config._attn_implementation != "sdpa"
            or torch.is_autocast_enabled(model.device.type)
            or not self._on_one_device()
            or count_hooks(model) != self._hooks
        )

    def _on_one_device(self) -> bool:
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        return len(devices) == 1 and (devices.pop().type == "cuda" or self._capture is not capture_on_cuda)

    def _slot_of(self, cache: DynamicCache, generation: _Generation, seen: Tensor | None) -> Slot | None:
        """The slot that shows this cache, with room for the next token; None: run without a graph."""
        layer = cache.layers[0]
        slot = layer.slot if type(layer) is BoundLayer else None
        length = cache.get_seq_length() if slot is None else slot.length
        window = _window(self.model.config)
        if window is not None and length + 1 > window:
            # Its layers keep what the window shows, and their masks know what that is.
            generation.taken = False
            release(cache)
            return None
        gap = slot is not None and seen is not None and seen.shape[1] != length + 1
        try:
            if slot is None or gap or not slot.intact or slot not in self.slots:
                slot = self._bind(cache, generation, seen)
            while slot is not None and slot.length + 1 > slot.capacity:
                slot.grow()
        except torch.OutOfMemoryError:
            # Both the cache and its buffers have to fit for a moment.
            generation.taken = False
            release(cache)
            return None
        return slot

    def _bind(self, cache: DynamicCache, generation: _Generation, seen: Tensor | None) -> Slot | None:
        layers, tokens = cache.layers, cache.get_seq_length()
        if not all(_is_bindable(layer, tokens) for layer in layers):
            return None
        batch = layers[0].keys.shape[0]
        if generation.steps_after(tokens) < FEWEST_STEPS or batch > MAX_BATCH:
            return None
        if seen is not None and seen.shape != (batch, tokens + 1):
            return None
        with self._lock:
            slot = next((slot for slot in self.slots if slot.free and slot.fits(layers)), None)
            if slot is None:
                slot = Slot(layers, length_for(tokens + 1))
            while slot.capacity < tokens + 1:
                slot.grow()
            slot.bind(cache, seen)
            # The last one is kept longest.
            self.slots = [*(other for other in self.slots if other is not slot), slot]
        weakref.finalize(cache, _trim, weakref.ref(self), weakref.ref(slot))
        return slot

    def _run(self, slot: Slot, generation: _Generation) -> Tensor:
        """Compute the token in `slot.ids`, and leave its keys and values in the slot."""
        length = length_for(slot.length + 1)
        graph = slot.graphs.get(length)
        if graph is not None:
            graph.replay()
            slot.length += 1
            return graph.logits
        cache, model = slot.graph_cache(length), self.model

        def step() -> Tensor:
            slot.mask.index_fill_(3, slot.index, 0)
            keywords = {self._keyword: cache, "use_cache": True, "return_dict": True}
            mask = slot.mask[..., :length]
            output = model(input_ids=slot.ids, position_ids=slot.positions, attention_mask=mask, **keywords)
            slot.index.add_(1)
            self._output = type(output)
            return output.logits

        device = torch.cuda.device(slot.index.device) if slot.index.is_cuda else nullcontext()
        with _CAPTURE, device, attend_over(slot, model), fused_rotary(model, self._family):
            logits = step()
            slot.length += 1
            try:
                slot.graphs[length] = self._capture(step)
            except torch.OutOfMemoryError:
                generation.taken = False  # the next one may find memory
            except Exception as error:  # whatever a model does that no graph can hold
                self._refuse(error)
        return logits

    def _refuse(self, error: Exception) -> None:
        self._refused, self.slots = True, []
        reason = " ".join(str(error).split())[:200]
        logger.warning("generate runs without CUDA graphs: %s: %s", type(error).__name__, reason)

    # A model is copied and pickled without its graphs.

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeRunner:
        return type(self)(copy.deepcopy(self.model, memo), self._hooks, self._capture)

    def __reduce__(self) -> Any:
        return type(self), (self.model, self._hooks, self._capture)


# What a capture changes for a moment, the attention of a model and a function of its file, is there once.
_CAPTURE = threading.RLock()


def attach_decode_runner(model: PreTrainedModel, **keywords: Any) -> DecodeRunner | None:
    """Let `model.generate` replay CUDA graphs; None: the model is of no family of ours, or transformers lacks a method.

    Args:
        keywords: of `DecodeRunner`.
    """
    names = ("_valid_auto_compile_criteria", "get_compiled_call")
    if family_of_class(model) is None or not all(callable(getattr(model, name, None)) for name in names):
        return None
    runner = DecodeRunner(model, count_hooks(model), **keywords)
    for name in names:
        setattr(model, name, getattr(runner, name.removeprefix("_")))
    return runner


def _is_plain_step(inputs: dict[str, Any], cache_name: str) -> bool:
    """Whether these are the inputs of one token for every sequence, and nothing that a graph does not take."""
    ids, seen, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    known = {"input_ids", "attention_mask", "position_ids", cache_name, "use_cache", "return_dict", "logits_to_keep"}
    return (
        isinstance(ids, Tensor)
        and ids.ndim == 2
        and ids.shape[1] == 1
        and (seen is None or (isinstance(seen, Tensor) and seen.ndim == 2))
        and (positions is None or (isinstance(positions, Tensor) and positions.shape == ids.shape))
        and not any(value is not None and value is not False for name, value in inputs.items() if name not in known)
    )


def _is_bindable(layer: Any, tokens: int) -> bool:
    """Whether a layer of a cache is filled with all tokens."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, BoundLayer) or tokens == 0:
        return False
    keys = layer.keys
    return keys is not None and keys.ndim == 4 and keys.shape[2] == tokens


def _window(config: Any) -> int | None:
    """The positions that every layer of a model sees; None: all of them."""
    kinds = getattr(config, "layer_types", None)
    windowed = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if windowed else None


def count_hooks(model: nn.Module) -> int:
    """Hooks on a model's modules: a replayed graph does not call them.

    Those of transformers do nothing but for outputs that are left to it, and stay once they have been asked for.
    """
    hooks = [
        hook
        for module in model.modules()
        if module._forward_hooks or module._forward_pre_hooks
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Where a model's tensors are: a graph reads them there, whatever the model holds by then."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))


def _trim(runner: weakref.ref[DecodeRunner], ended: weakref.ref[Slot]) -> None:
    """After a generation, give memory back: buffers that no generation uses, but for the last few.

    Args:
        ended: the slot of the generation.
    """
    owner, last = runner(), ended()
    if owner is None or last is None:
        return
    with owner._lock:
        idle = [slot for slot in owner.slots if slot is last or slot.free or slot.lent]
        left = kept_bytes(last.index.device)
        for slot in reversed(idle):
            left -= slot.bytes
            if left < 0 or slot.lent:
                owner.slots = [kept for kept in owner.slots if kept is not slot]


def kept_bytes(device: torch.device) -> float:
    """Of buffers that wait for the next generation."""
    return KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
