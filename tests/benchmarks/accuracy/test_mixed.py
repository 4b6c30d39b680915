"""Chosen bits against the ends at 4 bits: the same budget, every run in the file, nothing repeated."""

from types import SimpleNamespace

import pytest

from benchmarks.accuracy import mixed
from benchmarks.accuracy.runs import RunFile
from sliderquant.models.source import open_model
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.schemes import ModelScheme


@pytest.fixture(scope="module")
def deep_model(random_model, tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


def plan_for(model, average_bits, scheme="W2A16"):
    parsed = ModelScheme.parse(scheme)
    return make_plan(open_model(model), Request(model, parsed, METHODS["rtn"], seqlen=32, average_bits=average_bits))


def layers_at_4(allocation):
    return sorted({int(name.split(".")[2]) for name, bits in allocation.bits.items() if bits == 4})


def test_the_ends_are_as_many_layers_as_the_budget_allows(deep_model):
    assert {label: layers_at_4(found) for label, found in mixed.ends(plan_for(deep_model, 2.5)).items()} == {
        "first 1 and last 0 layers at 4": [0],
        "first 0 and last 1 layers at 4": [3],
    }
    assert {label: layers_at_4(found) for label, found in mixed.ends(plan_for(deep_model, 3.1)).items()} == {
        "first 1 and last 1 layers at 4": [0, 3]
    }
    ((_, found),) = mixed.ends(plan_for(deep_model, 8)).items()
    assert set(found.bits.values()) == {4}
    with pytest.raises(mixed.InputError, match="expected one of fewer than 4 bits"):
        mixed.ends(plan_for(deep_model, 5, "W4A16"))


def test_a_real_run(parsed, deep_model, calibration_file, tmp_path, capsys, monkeypatch):
    words = ["--model", deep_model, "--calibration", calibration_file, "--evaluation", f"{calibration_file}[:2000]"]
    words += ["--seqlen", 32, "--samples", 3, "--methods", "rtn", "gptq", "--average-bits", 2.5]
    mixed.run(parsed(mixed, *words))
    file = RunFile("mixed", tmp_path)
    rows = file.rows()
    ends = ["first 1 and last 0 layers at 4", "first 0 and last 1 layers at 4"]
    assert [(row["method"], row["bits"]) for row in rows] == [
        (method, bits) for method in ("rtn", "gptq") for bits in (*ends, mixed.CHOSEN)
    ]
    assert all(2 < row["code_bits"] <= 2.5 < row["stored_bits"] for row in rows)
    assert len({row["perplexity"] for row in rows}) == 6
    assert rows[2]["bits_by_kind"] == rows[5]["bits_by_kind"] != rows[0]["bits_by_kind"]
    assert str(deep_model) not in file.path.read_text()
    table = file.beside(".md").read_text()
    assert f"| gptq | chosen | {rows[5]['code_bits']:.3f} |" in table
    monkeypatch.setattr("sliderquant.quantize", lambda *_, **__: pytest.fail("a run was repeated"))
    mixed.run(parsed(mixed, *words, "--resume"))
    assert file.rows() == rows
    capsys.readouterr()
    with pytest.raises(SystemExit, match="average_bits 1 with scheme W2A16"):
        mixed.run(parsed(mixed, *words, "--average-bits", 1))


@pytest.mark.parametrize(
    ("given", "epochs"), [((), {"sliderquant-published": 10, "sliderquant": 8}), (("--epochs", 3), 3)]
)
def test_methods_with_efforts_have_epochs_of_their_own(
    parsed, deep_model, calibration_file, tmp_path, monkeypatch, given, epochs
):
    monkeypatch.setattr("sliderquant.quantize", lambda *_, **__: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr("sliderquant.evaluate", lambda *_, **__: SimpleNamespace(value=9.0, blocks=1, tokens=32))
    words = ["--model", deep_model, "--calibration", calibration_file, "--evaluation", calibration_file, "--seqlen", 32]
    methods = ("sliderquant-published", "sliderquant")
    mixed.run(parsed(mixed, *words, "--samples", 3, "--methods", *methods, *given))
    found = {row["method"]: row["epochs"] for row in RunFile("mixed", tmp_path).rows()}
    assert found == (epochs if isinstance(epochs, dict) else dict.fromkeys(methods, epochs))


def row(bits, perplexity, seed=2, method="rtn"):
    sizes = {"average_bits": 2.5, "code_bits": 2.5, "stored_bits": 2.6, "samples": 64}
    return {"model": "m", "scheme": "W2A16", "method": method, "bits": bits, "seed": seed, "seconds": 3.0, **sizes} | {
        "perplexity": perplexity
    }


def test_the_table():
    rows = [row("ends", 50.0), row("ends", 52.0, 3), row("other ends", 60.0)]
    rows += [row("chosen", 48.0), row("chosen", 49.0, 3)]
    lines = mixed.markdown([*rows, row("ends", 40.0, method="gptq")]).splitlines()
    assert "## m, W2A16, at most 2.5 bits, 64 samples" in lines
    assert "| rtn | ends | 2.500 | 2.600 | 51.00 | 2.00 | 3 | 2 3 |" in lines
    assert lines[-2:] == [
        "- rtn: chosen bits lose less than the best of the others, ends: -4.9%",
        "- gptq: not all runs are there",
    ]
    assert "**not** less" in mixed.markdown([row("ends", 47.0), row("chosen", 48.0)])
