"""Keys and values of generations by graphs: buffers that are shared, kept, grown, read, and given back."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sliderquant.decoding import cache as buffers
from sliderquant.decoding import runner as decoding
from sliderquant.decoding.runner import _Graph, attach_decode_runner
from sliderquant.loading import load
from sliderquant.models import family_of
from sliderquant.modules import cache_keyword, fuse_layers


def test_buffers_and_graphs_serve_the_next_generation(
    llama: PreTrainedModel,
    short_graphs: None,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    expected = [written(llama, prompt(seed=seed), 8) for seed in range(3)]
    runner, recorder = attached(llama)
    assert [torch.equal(written(llama, prompt(seed=s), 8), expected[s]) for s in range(3)] == [True] * 3
    assert (recorder.captures, len(runner.slots)) == (1, 1)
    written(llama, prompt(batch=3), 8)
    assert (recorder.captures, len(runner.slots)) == (2, 2)


def test_buffers_that_wait_are_few(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    runner, recorder = attached(llama)
    written(llama, prompt(1), 8)
    # Keys and values of 2 layers, 2 heads and 16 numbers of fp32 at 256 positions.
    size = runner.slots[0].bytes
    assert size == 2 * 2 * 2 * 16 * 4 * 256
    monkeypatch.setattr(decoding, "kept_bytes", lambda device: 3.5 * size)
    for batch in (2, 1, 3):
        written(llama, prompt(batch), 8)
    # The last one takes 3 of 3.5 sizes.
    assert [slot.batch for slot in runner.slots] == [3]
    monkeypatch.setattr(decoding, "kept_bytes", lambda device: 0)
    written(llama, prompt(3), 8)
    assert runner.slots == []
    assert recorder.captures == 3


def test_a_cache_that_is_kept_keeps_its_buffers(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    expected = written(llama, prompt(), 8, return_dict_in_generate=True)
    attached(llama)
    kept = written(llama, prompt(), 8, return_dict_in_generate=True)
    name = cache_keyword(llama.forward)
    written(llama, prompt(seed=3), 8)
    for ours, theirs in zip(kept[name].layers, expected[name].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    assert kept[name].get_seq_length() == expected[name].get_seq_length() == 12


def test_a_conversation_goes_on_with_its_cache(
    llama: PreTrainedModel,
    short_graphs: None,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    name = cache_keyword(llama.forward)

    def turns() -> list[Tensor]:
        past, ids, found = DynamicCache(config=llama.config), prompt(1)["input_ids"], []
        for turn in range(3):
            ids = written(llama, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 7, **{name: past})
            found.append(ids)
            ids = torch.cat([ids, prompt(1, 3, turn + 9)["input_ids"]], 1)
        return found

    expected = turns()
    runner, recorder = attached(llama)
    assert all(map(torch.equal, turns(), expected))
    assert recorder.replays > 10
    assert len(runner.slots) == 1, "each turn took buffers of its own"


def test_a_cache_is_cropped_copied_and_pickled(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    name = cache_keyword(llama.forward)
    attached(llama)
    past = written(llama, prompt(), 8, return_dict_in_generate=True)[name]
    copied = copy.deepcopy(past)
    stored = io.BytesIO()
    torch.save(past.layers, stored)
    stored.seek(0)
    pickled = torch.load(stored, weights_only=False)
    before = past.layers[0].keys
    past.crop(-3) if hasattr(DynamicLayer, "get_max_length") else past.crop(past.get_seq_length() - 3)
    assert past.get_seq_length() == 9
    for layer in (copied.layers[0], pickled[0]):
        assert type(layer) is DynamicLayer
        assert torch.equal(layer.keys, before)
    assert torch.equal(past.layers[0].keys, before[:, :, :9])


@pytest.mark.parametrize("given", ["nothing", "a cache without windows", "embeddings", "a cache of a turn before"])
def test_a_window_that_the_generation_leaves(
    given: str,
    folders: Callable[..., Path],
    short_graphs: None,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    model = load(folders("mistral", sliding_window=24), device="cpu")
    name = cache_keyword(model.forward)

    def run() -> list[int]:
        inputs: dict[str, Any] = prompt(1)
        if given == "embeddings":
            inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        if given == "a cache without windows":
            inputs[name] = DynamicCache()
        if given == "a cache of a turn before":
            turn = written(model, inputs, 10, return_dict_in_generate=True)
            ids = torch.cat([turn.sequences, prompt(1, 3, 9)["input_ids"]], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: turn[name]}
        return written(model, inputs, 30)[0].tolist()

    expected = run()
    _, recorder = attached(model)
    assert run() == expected
    assert recorder.replays >= 6


def test_the_layers_of_a_window_come_back(
    folders: Callable[..., Path], attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    model = load(folders("mistral", sliding_window=24), device="cpu")
    name = cache_keyword(model.forward)
    expected = written(model, prompt(), 30, return_dict_in_generate=True)[name]
    attached(model)
    found = written(model, prompt(), 30, return_dict_in_generate=True)[name]
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_a_cache_of_another_class_is_left_alone(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    class Counting(DynamicCache):
        updates = 0

        def update(self, *arguments: Any, **keywords: Any) -> Any:
            type(self).updates += 1
            return super().update(*arguments, **keywords)

    attached(llama)
    written(llama, prompt(), 8, **{cache_keyword(llama.forward): Counting(config=llama.config)})
    assert Counting.updates == 2 * 8


def test_keys_that_were_read_are_those_of_the_cache(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    name = cache_keyword(llama.forward)
    runner, _ = attached(llama)
    past = written(llama, prompt(), 8, return_dict_in_generate=True)[name]
    keys = past.layers[0].keys
    keys[:, :, 3] = 0
    assert past.layers[0].keys[:, :, 3].abs().sum() == 0
    del past
    assert runner.slots == [], "another generation would write into what was handed out"
    before = keys.clone()
    written(llama, prompt(seed=5), 8)
    assert torch.equal(keys, before)


def test_what_was_cropped_is_not_written_over(
    llama: PreTrainedModel,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    attached(llama)
    past = written(llama, prompt(), 8, return_dict_in_generate=True)[cache_keyword(llama.forward)]
    # As `crop` does it: the layers hold parts of the buffers from here on.
    for layer in past.layers:
        layer.keys, layer.values = layer.keys[:, :, :9], layer.values[:, :, :9]
    before = [layer.keys.clone() for layer in past.layers]
    written(llama, prompt(seed=5), 8)
    assert all(map(torch.equal, [layer.keys for layer in past.layers], before))


@pytest.mark.parametrize("where", ["Slot.__init__", "Slot.grow", "capture"])
def test_memory_that_is_not_there(
    where: str,
    llama: PreTrainedModel,
    short_graphs: None,
    monkeypatch: pytest.MonkeyPatch,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    expected = written(llama, prompt(), 40)

    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner, recorder = attached(llama)
    with monkeypatch.context() as patch:
        if where == "capture":
            patch.setattr(runner, "_capture", refuse)
        else:
            patch.setattr(buffers.Slot, where.removeprefix("Slot."), refuse)
        assert torch.equal(written(llama, prompt(), 40), expected)
    assert recorder.captures == (1 if where == "Slot.grow" else 0)
    assert torch.equal(written(llama, prompt(), 40), expected)
    assert recorder.captures == 3


def test_a_model_that_is_deleted_is_gone(
    folders: Callable[..., Path], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    model = load(folders("llama"), device="cpu")
    # A CUDA graph does not hold what was captured.
    runner = attach_decode_runner(model, capture=lambda step: _Graph(lambda: None, torch.zeros(2, 1, 2048)))
    assert runner is not None
    fuse_layers(model, family_of("", None, [type(model).__name__]))
    written(model, prompt(), 8)
    found = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp.down_proj), weakref.ref(runner.slots[0])]
    gc.disable()
    try:
        del model, runner
        assert [reference() for reference in found] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(("tokens", "length"), [(1, 256), (256, 256), (257, 512), (512, 512), (513, 1024)])
def test_length_for(tokens: int, length: int) -> None:
    assert buffers.length_for(tokens) == length
