"""CUDA graphs of real steps. Runs on a machine with a GPU; elsewhere every test is skipped with the reason."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from sliderquant.decoding import DecodeRunner
from sliderquant.loading import load
from sliderquant.models import FAMILIES
from sliderquant.pipeline import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, torch finds none")

FAMILY_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]
# Split-K for few rows, groups, and a rotation by a kernel: sizes that the kernels have tiles for.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 1024}


@pytest.fixture
def make_model(tmp_path: Path, random_model: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    def make(model_type: str = "llama", scheme: str = "W4A16-g64", **keywords: Any) -> PreTrainedModel:
        source = random_model(tmp_path / "source", model_type=model_type, **SIZES)
        quantize(source, tmp_path / "out", scheme=scheme, method="rtn", device="cpu", **keywords)
        return load(tmp_path / "out", device="cuda")

    return make


def prompt(batch: int = 2, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(2, 2000, (batch, tokens), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int = 40, **keywords: Any) -> Any:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**inputs, **{**settings, **keywords}, return_dict_in_generate=True, output_logits=True)
    # Without the cache: the next generation takes the same buffers.
    return SimpleNamespace(sequences=found.sequences, logits=found.logits)


def runner_of(model: PreTrainedModel) -> DecodeRunner:
    return model.get_compiled_call.__self__


def assert_same_until_a_tie(found: Any, expected: Any) -> None:
    """Logits agree up to rounding, as long as both have written the same tokens."""
    for step, (ours, theirs) in enumerate(zip(found.logits, expected.logits, strict=True)):
        same = (found.sequences == expected.sequences)[:, : found.sequences.shape[1] - len(found.logits) + step].all(1)
        if step < 4:
            assert same.all()
        for row in same.nonzero().flatten().tolist():
            assert (ours[row] - theirs[row]).norm() <= 0.05 * theirs[row].norm()


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_every_family(model_type: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model, inputs = make_model(model_type), prompt()
    inputs["attention_mask"][0, :4] = 0
    expected = written(model, inputs, disable_compile=True)
    for _ in range(2):
        assert_same_until_a_tie(written(model, inputs), expected)
    (slot,) = runner_of(model).slots
    assert set(slot.graphs) == {256}
    assert not runner_of(model)._refused


@pytest.mark.parametrize(
    ("scheme", "keywords"),
    [("W4A4KV4", {"rotate": ["R1", "R3", "R4"]}), ("W4A8", {}), ("W2A16-g64", {}), ("W3A16-g128", {}), ("W8A16", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_scheme(scheme: str, keywords: Any, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(scheme=scheme, **keywords)
    expected = written(model, prompt(), disable_compile=True)
    assert_same_until_a_tie(written(model, prompt()), expected)
    assert not runner_of(model)._refused
    assert runner_of(model).slots[0].graphs


def test_a_replay_is_the_step_that_was_captured(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    once, again = written(model, prompt()), written(model, prompt())
    assert torch.equal(once.sequences, again.sequences)
    # The first decoded token was computed by the step itself in the one, by a replay in the other.
    assert all(map(torch.equal, once.logits[:2], again.logits[:2]))
    assert len(runner_of(model).slots) == 1


def test_longer_generations_double_the_positions(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    expected = written(model, prompt(1), 560, disable_compile=True)
    found = written(model, prompt(1), 560)
    assert set(runner_of(model).slots[0].graphs) == {1024}
    assert_same_until_a_tie(found, expected)


def test_threads(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    expected = [written(model, prompt(seed=seed)).sequences for seed in range(3)]
    found: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[seed] = written(model, prompt(seed=seed)).sequences
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_inference_mode_and_back(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    with torch.inference_mode():
        first = written(model, prompt()).sequences
    assert torch.equal(written(model, prompt()).sequences, first)
    assert len(runner_of(model).slots) == 1


@pytest.mark.parametrize("scheme", ["W4A16-g64", "W4A4"])
def test_transformers_compiles_the_step_with_its_own_graphs(
    scheme: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(scheme=scheme)
    # Against the same compiled step without graphs: a compiler leaves roundings out, and at 4 bits that changes codes.
    plain, graphs = (
        written(model, prompt(), 12, cache_implementation="static", compile_config=CompileConfig(mode=mode))
        for mode in ("default", "reduce-overhead")
    )
    assert_same_until_a_tie(graphs, plain)


WARMED = """
import sys, pathlib, torch, sliderquant
from sliderquant.warming import warm_up
cache = pathlib.Path(sys.argv[2])
model = sliderquant.load(sys.argv[1], device="cuda")
found = warm_up(model, tokens=(1, 8, 64, 300), batches=(), processes=2)
assert not found.errors, found.errors
before = len(list(cache.glob("*/*.cubin")))
again = warm_up(model, tokens=(1, 8, 64, 300), batches=())
print(found.kernels, before, again.kernels)
"""


def test_what_is_compiled_in_parallel_is_what_is_launched(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    make_model(scheme="W4A4", rotate=["R1", "R4"])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WARMED, str(tmp_path / "out"), str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recorded, compiled, left = map(int, done.stdout.split()[-3:])
    assert (compiled, left) == (recorded, 0), "a launch compiled another kernel than its job"
