"""Steps by a graph, against the same generation without. On a CPU a replay is a call of what was captured."""

import copy
import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sliderquant.decoding.runner import _Graph, attach_decode_runner
from sliderquant.loading import load
from sliderquant.models import FAMILIES

FAMILY_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_every_family_writes_what_it_writes_without_graphs(
    model_type: str,
    folders: Callable[..., Path],
    short_graphs: None,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
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
def test_every_kind_of_scheme(
    scheme: str,
    folders: Callable[..., Path],
    short_graphs: None,
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    model = load(folders("llama", scheme), device="cpu")
    expected = written(model, prompt(), 20)
    _, recorder = attached(model)
    assert torch.equal(written(model, prompt(), 20), expected)
    assert recorder.replays == 17


def test_sampling_stopping_and_streaming_see_what_they_see_without(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
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
def test_what_it_leaves_to_transformers(
    llama: PreTrainedModel,
    keywords: dict[str, Any],
    attached: Callable[..., Any],
    prompt: Callable[..., Any],
    written: Callable[..., Any],
) -> None:
    inputs = prompt(1)
    expected = written(llama, inputs, 8, **keywords)
    _, recorder = attached(llama)
    found = written(llama, inputs, 8, **keywords)
    assert recorder.captures == 0
    if not isinstance(found, Tensor):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def test_an_assistant_proposes_several_tokens_at_a_time(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    inputs, assistant = prompt(1), copy.deepcopy(llama)
    attached(llama)
    attached(assistant)
    found = written(llama, inputs, 20, assistant_model=assistant)
    assert torch.equal(found, written(llama, inputs, 20, disable_compile=True))


def test_hooks_of_a_user_are_called(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    _, recorder = attached(llama)
    calls: list[int] = []
    handle = llama.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    written(llama, prompt(), 8)
    assert (recorder.captures, len(calls)) == (0, 8)
    handle.remove()
    written(llama, prompt(), 8)
    assert recorder.captures == 1


def test_other_weights_need_other_graphs(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    _, recorder = attached(llama)
    written(llama, prompt(), 8)
    llama.model.norm.weight = torch.nn.Parameter(torch.flip(llama.model.norm.weight, [0]), requires_grad=False)
    found = written(llama, prompt(), 8)
    assert recorder.captures == 2
    assert torch.equal(found, written(llama, prompt(), 8, disable_compile=True))


def test_attention_without_masks_of_numbers_is_left_alone(
    folders: Callable[..., Path], attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    model = load(folders("llama"), device="cpu", attn_implementation="eager")
    _, recorder = attached(model)
    written(model, prompt(), 8)
    assert recorder.captures == 0
    assert model.config._attn_implementation == "eager"


def test_a_generation_inside_of_another(
    folders: Callable[..., Path], attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    model = load(folders("mistral", sliding_window=24), device="cpu")

    class Nested:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] == 5:
                written(model, prompt(1, 4, 3), 6)
            return scores

    expected = written(model, prompt(), 30, logits_processor=[Nested()])
    attached(model)
    assert torch.equal(written(model, prompt(), 30, logits_processor=[Nested()]), expected)


def test_outputs_that_were_asked_for_once(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    _, recorder = attached(llama)
    llama(prompt()["input_ids"], output_hidden_states=True)
    written(llama, prompt(), 8, output_hidden_states=True, return_dict_in_generate=True)
    assert recorder.captures == 0
    written(llama, prompt(), 8)
    assert recorder.captures == 1


def test_what_is_called_by_hand_is_not_a_step(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    attached(llama)
    written(llama, prompt(), 8)
    by_hand = llama.get_compiled_call(None)
    assert type(by_hand).__name__ != "partial"


def test_a_few_tokens_are_not_worth_a_graph(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
    _, recorder = attached(llama)
    written(llama, prompt(), 3)
    assert recorder.captures == 0


def test_a_model_that_cannot_be_captured_runs_without(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture, prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
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


def test_a_copied_and_a_pickled_model_have_runners_of_their_own(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
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


def test_threads_have_buffers_of_their_own(
    llama: PreTrainedModel, attached: Callable[..., Any], prompt: Callable[..., Any], written: Callable[..., Any]
) -> None:
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
