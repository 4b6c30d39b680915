"""The user's path, measured: a tiny checkpoint beside its original, in processes of their own."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from sliderquant import quantize
from sliderquant.errors import InputError, SliderQuantError
from sliderquant.evaluation.bench import Bench, _metrics, bench
from sliderquant.evaluation.bench_worker import Job, Worker, weight_bytes
from sliderquant.reports.bench import bench_figure, check_output, write_bench
from tests.conftest import save_random_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(original, its checkpoint at W4A16-g32)"""
    base = tmp_path_factory.mktemp("bench")
    original = save_random_model(base / "original")
    return original, quantize(original, base / "w4", scheme="W4A16-g32", method="rtn").path


@pytest.fixture(scope="module")
def result(folders: tuple[Path, Path]) -> Bench:
    original, checkpoint = folders
    return bench(
        checkpoint, original, device="cpu", prompts=(4, 20, 4000), batches=(1, 3), new_tokens=5, repeats=2, rounds=1
    )


def test_every_row_has_both_and_a_ratio(result: Bench) -> None:
    names = [metric.name for metric in result.metrics]
    assert names == [
        "load",
        "first token, 4",
        "first token, 20",  # not 4000: more than the model takes
        "decode, batch 1",
        "decode, batch 3",
        "weights",
        "memory while loading",
        "memory while running",
    ]
    for metric in result.metrics:
        assert metric.values.keys() == {"quantized", "original"}
        assert all(value > 0 for value in metric.values.values())
        assert metric.ratio is not None
        assert metric.spread[0] <= metric.ratio <= metric.spread[1]
    assert result.metric("weights").values["original"] > result.metric("weights").values["quantized"]
    assert result.settings["dtypes"] == {"quantized": "bfloat16", "original": "bfloat16"}
    assert {len(values) for values in result.raw["original"].values()} == {1, 2}


def test_what_a_worker_says(folders: tuple[Path, Path]) -> None:
    worker = Worker(Job(str(folders[1]), "cpu", new_tokens=4))
    assert worker.load() > 0
    assert worker.first_token(4000) is None
    assert worker.first_token(4) > 0
    assert worker.decode(2) > 0
    facts = worker.facts()
    assert facts["weight_bytes"] == weight_bytes(worker.model)
    assert facts["dtype"] == "bfloat16"
    assert facts["memory"].keys() == {"before", "load", "run"}
    assert min(facts["memory"].values()) > 10_000_000  # bytes: Python alone takes more


def test_attention_that_a_file_names_is_not_fetched(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """It may be code on the hub."""
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/attention"}))
    worker = Worker(Job(str(copy), "cpu", new_tokens=2))
    worker.load()
    assert worker.model.config._attn_implementation == "sdpa"
    assert worker.decode(1) > 0


def test_shared_weights_count_once() -> None:
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert weight_bytes(torch.nn.Sequential(first, second)) == 64


def test_ratios_are_of_calls_that_followed_each_other() -> None:
    # Twice as slow in the second half of the run, for both: medians alone would tell another story.
    raw = {
        "quantized": {"first token, 8": [1.0, 1.0, 4.0], "decode, batch 1": [6.0, 6.0, 3.0], "weights": [2.0] * 3},
        "original": {"first token, 8": [2.0, 2.0, 8.0], "decode, batch 1": [2.0, 2.0, 1.0], "weights": [8.0] * 3},
    }
    first, decode, weights = _metrics(raw)
    assert (first.ratio, first.spread, first.unit) == (2.0, (2.0, 2.0), "s")
    assert (decode.ratio, decode.unit) == (3.0, "tokens/s")
    assert (weights.ratio, weights.unit) == (0.25, "MB")
    (alone,) = _metrics({"quantized": {"load": [3.0, 1.0, 2.0]}})
    assert (alone.values, alone.ratio) == ({"quantized": 2.0}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": (0,)}, r"prompts \[0\]: expected numbers of 1 or more"),
        ({"batches": (-1,)}, r"batches \[-1\]: expected"),
        ({"new_tokens": 1}, "new_tokens is 1: expected 2 or more"),
        ({"rounds": 0}, "rounds is 0: expected 1 or more"),
        ({"dtype": "int8"}, "dtype 'int8': expected auto"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"against": "/nowhere/at/all"}, "/nowhere/at/all: no such folder"),
    ],
)
def test_bad_arguments_are_refused_first(folders, changes, message, monkeypatch) -> None:
    monkeypatch.setattr("sliderquant.evaluation.bench._Process", None)
    with pytest.raises(InputError, match=message):
        bench(folders[1], **{"device": "cpu", **changes})


def test_an_original_is_no_checkpoint(folders: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        bench(folders[0])


def test_a_process_that_fails_says_why(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders[1].iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(SliderQuantError, match=r"broken: load could not be measured: .*model\.safetensors"):
        bench(broken, device="cpu", rounds=1)


def test_files(result: Bench, tmp_path: Path) -> None:
    written = write_bench(result, tmp_path / "out")
    assert [path.name for path in written] == ["bench.json", "bench.png"]
    stored = json.loads(written[0].read_text(encoding="utf-8"))
    assert stored["metrics"][0]["name"] == "load"
    assert stored["definitions"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"holds bench\.json, bench\.png"):
        check_output(tmp_path / "out", overwrite=False)
    check_output(tmp_path / "out", overwrite=True)


def test_the_picture_shows_each_bar(result: Bench) -> None:
    load, first, decode, memory = bench_figure(result).axes
    assert [len(axes.patches) for axes in (load, first, decode, memory)] == [2, 4, 4, 6]
    assert [text.get_text() for text in first.texts] == [f"{result.metrics[i].ratio:.2f}x" for i in (1, 2)]
    alone = dataclasses.replace(
        result,
        metrics=[
            dataclasses.replace(m, values={"quantized": m.values["quantized"]}, ratio=None) for m in result.metrics
        ],
    )
    assert [len(axes.patches) for axes in bench_figure(alone).axes] == [1, 2, 2, 3]
