"""Steps by a graph, against the same generation without. On a CPU a replay is a call of what was captured."""

import copy
import gc
import io
import logging
import threading
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
from sliderquant.decoding.runner import DecodeRunner, _Graph, attach_decode_runner
from sliderquant.loading import load
from sliderquant.models import FAMILIES, family_of
from sliderquant.modules import cache_keyword, fuse_layers
from sliderquant.pipeline import quantize

FAMILY_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


class Recorder:
    """Captures without a GPU: nothing is computed until the replay, and the logits stay where they are."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> _Graph:
        self.captures += 1
        graph = _Graph(lambda: None, torch.empty(0))

        def replay() -> None:
            self.replays += 1
            logits = step()
            graph.logits = logits if graph.logits.numel() == 0 else graph.logits.copy_(logits)

        graph.replay = replay
        return graph


@pytest.fixture
def short_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs over 16, 32, 64, ... positions, so that a few tokens need several of them."""
    monkeypatch.setattr(buffers, "SHORTEST", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]) -> Callable[..., Path]:
    found: dict[tuple[str, str], Path] = {}

    def folder(model_type: str, scheme: str = "W4A16-g32", **changes: Any) -> Path:
        key = (model_type, scheme + str(changes))
        if key not in found:
            where = tmp_path_factory.mktemp(model_type)
            source = random_model(where / "source", dtype="float32", model_type=model_type, **changes)
            quantize(source, where / "out", scheme=scheme, method="rtn")
            found[key] = where / "out"
        return found[key]

    return folder


@pytest.fixture
def llama(folders: Callable[..., Path]) -> PreTrainedModel:
    return load(folders("llama"), device="cpu")


def attached(model: PreTrainedModel) -> tuple[DecodeRunner, Recorder]:
    recorder = Recorder()
    runner = attach_decode_runner(model, capture=recorder)
    assert runner is not None
    return runner, recorder


def prompt(batch: int = 2, tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(2, 2000, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int = 40, **keywords: Any) -> Any:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **{**settings, **keywords})


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_every_family_writes_what_it_writes_without_graphs(
    model_type: str, folders: Callable[..., Path], short_graphs: None
) -> None:
    model = load(folders(model_type), device="cpu")
    inputs = prompt()
    inputs["attention_mask"][0, :3] = 0  # padding on the left
    expected = written(model, inputs, output_logits=True, return_dict_in_generate=True)
    _, recorder = attached(model)
    found = written(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    # 39 steps over 16, 32 and 64 positions: the first of each is run and captured.
    assert (recorder.captures, recorder.replays) == (3, 36)


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A8", "W2A16-g32"])
def test_every_kind_of_scheme(scheme: str, folders: Callable[..., Path], short_graphs: None) -> None:
    model = load(folders("llama", scheme), device="cpu")
    expected = written(model, prompt(), 20)
    _, recorder = attached(model)
    assert torch.equal(written(model, prompt(), 20), expected)
    assert recorder.replays == 17


def test_sampling_stopping_and_streaming_see_what_they_see_without(llama: PreTrainedModel) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    def run() -> tuple[list[int], list[int]]:
        torch.manual_seed(1)
        streamer = Streamer()
        found = written(
            llama, prompt(1), 30, do_sample=True, temperature=1.5, top_k=50, repetition_penalty=1.2, streamer=streamer,
            min_new_tokens=None, eos_token_id=list(range(0, 2000, 10)),
        )  # fmt: skip
        return found[0].tolist(), streamer.tokens

    expected = run()
    _, recorder = attached(llama)
    assert run() == expected
    assert len(expected[0]) < 35, "nothing stopped it early"
    assert recorder.replays == len(expected[0]) - 5 - 2


def test_buffers_and_graphs_serve_the_next_generation(llama: PreTrainedModel, short_graphs: None) -> None:
    expected = [written(llama, prompt(seed=seed), 8) for seed in range(3)]
    runner, recorder = attached(llama)
    assert [torch.equal(written(llama, prompt(seed=s), 8), expected[s]) for s in range(3)] == [True] * 3
    assert (recorder.captures, len(runner.slots)) == (1, 1)
    written(llama, prompt(batch=3), 8)
    assert (recorder.captures, len(runner.slots)) == (2, 2)


def test_buffers_that_wait_are_few(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_cache_that_is_kept_keeps_its_buffers(llama: PreTrainedModel) -> None:
    expected = written(llama, prompt(), 8, return_dict_in_generate=True)
    attached(llama)
    kept = written(llama, prompt(), 8, return_dict_in_generate=True)
    name = cache_keyword(llama.forward)
    written(llama, prompt(seed=3), 8)
    for ours, theirs in zip(kept[name].layers, expected[name].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    assert kept[name].get_seq_length() == expected[name].get_seq_length() == 12


def test_a_conversation_goes_on_with_its_cache(llama: PreTrainedModel, short_graphs: None) -> None:
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


def test_a_cache_is_cropped_copied_and_pickled(llama: PreTrainedModel) -> None:
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


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_beams": 2},
        {"disable_compile": True},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_what_it_leaves_to_transformers(llama: PreTrainedModel, keywords: dict[str, Any]) -> None:
    inputs = prompt(1)
    expected = written(llama, inputs, 8, **keywords)
    _, recorder = attached(llama)
    found = written(llama, inputs, 8, **keywords)
    assert recorder.captures == 0
    if not isinstance(found, Tensor):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_an_assistant_proposes_several_tokens_at_a_time(llama: PreTrainedModel) -> None:
    inputs, assistant = prompt(1), copy.deepcopy(llama)
    attached(llama)
    attached(assistant)
    found = written(llama, inputs, 20, assistant_model=assistant)
    assert torch.equal(found, written(llama, inputs, 20, disable_compile=True))


def test_hooks_of_a_user_are_called(llama: PreTrainedModel) -> None:
    _, recorder = attached(llama)
    calls: list[int] = []
    handle = llama.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    written(llama, prompt(), 8)
    assert (recorder.captures, len(calls)) == (0, 8)
    handle.remove()
    written(llama, prompt(), 8)
    assert recorder.captures == 1


def test_other_weights_need_other_graphs(llama: PreTrainedModel) -> None:
    _, recorder = attached(llama)
    written(llama, prompt(), 8)
    llama.model.norm.weight = torch.nn.Parameter(torch.flip(llama.model.norm.weight, [0]), requires_grad=False)
    found = written(llama, prompt(), 8)
    assert recorder.captures == 2
    assert torch.equal(found, written(llama, prompt(), 8, disable_compile=True))


def test_attention_without_masks_of_numbers_is_left_alone(folders: Callable[..., Path]) -> None:
    model = load(folders("llama"), device="cpu", attn_implementation="eager")
    _, recorder = attached(model)
    written(model, prompt(), 8)
    assert recorder.captures == 0
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("given", ["nothing", "a cache without windows", "embeddings", "a cache of a turn before"])
def test_a_window_that_the_generation_leaves(given: str, folders: Callable[..., Path], short_graphs: None) -> None:
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


def test_the_layers_of_a_window_come_back(folders: Callable[..., Path]) -> None:
    model = load(folders("mistral", sliding_window=24), device="cpu")
    name = cache_keyword(model.forward)
    expected = written(model, prompt(), 30, return_dict_in_generate=True)[name]
    attached(model)
    found = written(model, prompt(), 30, return_dict_in_generate=True)[name]
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_a_generation_inside_of_another(folders: Callable[..., Path]) -> None:
    model = load(folders("mistral", sliding_window=24), device="cpu")

    class Nested:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] == 5:
                written(model, prompt(1, 4, 3), 6)
            return scores

    expected = written(model, prompt(), 30, logits_processor=[Nested()])
    attached(model)
    assert torch.equal(written(model, prompt(), 30, logits_processor=[Nested()]), expected)


def test_a_cache_of_another_class_is_left_alone(llama: PreTrainedModel) -> None:
    class Counting(DynamicCache):
        updates = 0

        def update(self, *arguments: Any, **keywords: Any) -> Any:
            type(self).updates += 1
            return super().update(*arguments, **keywords)

    attached(llama)
    written(llama, prompt(), 8, **{cache_keyword(llama.forward): Counting(config=llama.config)})
    assert Counting.updates == 2 * 8


def test_outputs_that_were_asked_for_once(llama: PreTrainedModel) -> None:
    _, recorder = attached(llama)
    llama(prompt()["input_ids"], output_hidden_states=True)
    written(llama, prompt(), 8, output_hidden_states=True, return_dict_in_generate=True)
    assert recorder.captures == 0
    written(llama, prompt(), 8)
    assert recorder.captures == 1


def test_what_is_called_by_hand_is_not_a_step(llama: PreTrainedModel) -> None:
    attached(llama)
    written(llama, prompt(), 8)
    by_hand = llama.get_compiled_call(None)
    assert type(by_hand).__name__ != "partial"


def test_keys_that_were_read_are_those_of_the_cache(llama: PreTrainedModel) -> None:
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


@pytest.mark.parametrize("where", ["Slot.__init__", "Slot.grow", "capture"])
def test_memory_that_is_not_there(
    where: str, llama: PreTrainedModel, short_graphs: None, monkeypatch: pytest.MonkeyPatch
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


def test_a_model_that_is_deleted_is_gone(folders: Callable[..., Path]) -> None:
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


def test_a_few_tokens_are_not_worth_a_graph(llama: PreTrainedModel) -> None:
    _, recorder = attached(llama)
    written(llama, prompt(), 3)
    assert recorder.captures == 0


def test_a_model_that_cannot_be_captured_runs_without(llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    expected = written(llama, prompt(), 8)

    def refuse(step: Callable[[], Tensor]) -> _Graph:
        raise RuntimeError("operation not permitted when stream is capturing")

    attach_decode_runner(llama, capture=refuse)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(written(llama, prompt(), 8), expected)
        assert torch.equal(written(llama, prompt(), 8), expected)
    messages = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert messages == [
        "generate runs without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_a_copied_and_a_pickled_model_have_runners_of_their_own(llama: PreTrainedModel) -> None:
    runner, _ = attached(llama)
    expected = written(llama, prompt(), 8)
    copied = copy.deepcopy(llama)
    stored = io.BytesIO()
    torch.save(llama, stored)
    stored.seek(0)
    for other in (copied, torch.load(stored, weights_only=False)):
        theirs = other.get_compiled_call.__self__
        assert theirs is not runner
        assert theirs.model is other
        assert torch.equal(written(other, prompt(), 8), expected)
        assert len(theirs.slots) == 1


def test_threads_have_buffers_of_their_own(llama: PreTrainedModel) -> None:
    prompts = [prompt(seed=seed) for seed in range(4)]
    expected = [written(llama, inputs, 20) for inputs in prompts]
    attached(llama)
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        for _ in range(3):
            found[index] = written(llama, prompts[index], 20)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(4))


def test_load_attaches_it_on_cuda_alone(llama: PreTrainedModel) -> None:
    assert "get_compiled_call" not in vars(llama)


@pytest.mark.parametrize(("tokens", "length"), [(1, 256), (256, 256), (257, 512), (512, 512), (513, 1024)])
def test_length_for(tokens: int, length: int) -> None:
    assert buffers.length_for(tokens) == length
