"""Ablations: every row is a setting that there is, one thing at a time, nothing run twice."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.accuracy import ablate
from benchmarks.accuracy.ablations import ABLATIONS, BASE
from benchmarks.accuracy.runs import Place, RunFile, Text
from sliderquant.planning.methods import METHODS
from sliderquant.schemes import ModelScheme


def flat(settings, prefix=""):
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


PLACE = Place("a-model", "a-model", Text("a", "a"), Text("b", "b"), seqlen=32)
ONE_THING = [name for name, ablation in ABLATIONS.items() if ablation.method != "sliderquant" and ablation.base]


@pytest.mark.parametrize("name", sorted(set(ABLATIONS) - set(ONE_THING)))
def test_rows_of_the_recipe_are_runs_of_their_own(name):
    ablation = ABLATIONS[name]
    cases = ablate.plan("a-model", [name], None, None, 64, [2])[1:]
    assert {case.method for case in cases} == {ablation.method}
    assert len({case.settings for case in cases}) == len(cases) == len(ablation.rows) + 1
    # A method with efforts keeps its epochs, the others have those of the table.
    own = METHODS[ablation.method].settings_for(ModelScheme.parse(ablation.scheme)).epochs
    for epochs in (None, 4):
        budget = epochs or (own if METHODS[ablation.method].efforts else 10)
        for case in ablate.plan("a-model", [name], None, epochs, 64, [2])[1:]:
            assert case.epochs == round(budget * ablation.longer.get(case.label, 1))
            # All of them are rows of one table.
            assert case.described(PLACE)["epochs"] == budget
    assert set(ablation.longer) <= set(ablation.rows)


@pytest.mark.parametrize("name", ONE_THING)
def test_rows_change_what_they_are_about(name):
    about = {"ramps": "windows.", "clipping": ("clipping", "grid", "learning_rates.clipping")}.get(name, name)
    cases = ablate.plan("a-model", [name], None, 10, 64, [2])[1:]
    base = flat(cases[0].settings.model_dump())
    assert cases[0].label == BASE
    ablation = ABLATIONS[name]
    own = METHODS[ablation.method].settings_for(ModelScheme.parse(cases[0].scheme)).model_dump()
    assert base == flat(own) | flat(ablation.base) | {"epochs": 10} != flat(own) | {"epochs": 10}
    rows = [flat(case.settings.model_dump()) for case in cases[1:]]
    for row in rows:
        assert all(key.startswith(about) for key in row if row[key] != base[key])
    assert len({json.dumps(row) for row in rows}) == len(rows) >= 2


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_heading_says_what_every_row_has(name):
    ablation = ABLATIONS[name]
    assert bool(ablation.base) == bool(ablation.base_text)


def test_ramps_are_shortened_only_where_there_are_any():
    def ramps(name):
        base = next(case for case in ablate.plan("stories260K", [name], None, 10, 64, [2]) if case.label == BASE)
        return base.settings.windows.shallow, base.settings.windows.deep

    assert [ramps(name) for name in ("gamma", "recipe", "schedule")] == [(2, 2), (2, 2), (0, 0)]


def test_rows_win_over_what_every_row_has():
    cases = ablate.plan("a-model", ["clipping"], None, 10, 64, [2])[1:]
    rates = {case.label: case.settings.learning_rates for case in cases}
    assert rates[BASE].clipping == 1e-3 != rates["clipped ranges"].clipping
    assert {rate.low_rank for rate in rates.values()} == {1e-3}


def test_plan():
    cases = ablate.plan("stories260K", ["gamma", "scales"], None, 5, 32, [2, 3])
    assert cases[0].method == "original"
    assert [(case.ablation, case.label, case.seed) for case in cases[1:5]] == [
        ("gamma", BASE, 2), ("gamma", BASE, 3), ("gamma", "one stage", 2), ("gamma", "one stage", 3)
    ]  # fmt: skip
    assert {case.scheme for case in cases[1:] if case.ablation == "gamma"} == {"W2A16"}
    assert {case.scheme for case in cases[1:] if case.ablation == "scales"} == {"W4A4KV4"}
    assert {(case.settings.windows.shallow, case.settings.epochs, case.samples) for case in cases[1:]} == {(2, 5, 32)}
    assert {case.scheme for case in ablate.plan("m", ["scales"], "W4A4", 5, 32, [2])[1:]} == {"W4A4"}


def test_the_table(run_row):
    rows = [
        run_row("m", "W2A16", "sliderquant-published", value, seed=seed, ablation="gamma", label=label)
        for label, values in (("one stage", (66.0,)), (BASE, (59.0, 61.0)))
        for seed, value in enumerate(values)
    ]
    original = run_row("m", "16 bits", "original", 40.0)
    lines = ablate.markdown([original, *rows]).splitlines()
    run = "m, W2A16, 10 epochs, 64 samples (16 bits: 40.00)"
    assert f"`sliderquant-published` ({ABLATIONS['gamma'].base_text}), {run}" in lines
    alone = ablate.markdown([original, *({**row, "ablation": "recipe_alone"} for row in rows)])
    assert f"`sliderquant-published`, {run}" in alone.splitlines()
    assert lines[-2:] == [f"| {BASE} | 60.00 | 2.00 |  | 12 | 0 1 |", "| one stage | 66.00 |  | +10.0% | 12 | 0 |"]


def test_a_real_run(parsed, tiny_llama, calibration_file, tmp_path, capsys):
    words = ["--model", tiny_llama, "--calibration", calibration_file, "--evaluation", f"{calibration_file}[:2000]"]
    words += ["--seqlen", 32, "--samples", 3, "--epochs", 2, "--seeds", 2, 3]
    ablate.run(parsed(ablate, "stage_order", *words))
    file = RunFile("ablations", tmp_path)
    rows = file.rows()
    assert [(row.get("label"), row["seed"]) for row in rows] == [
        (None, None), (BASE, 2), (BASE, 3), ("sweep", 2), ("sweep", 3), ("window", 2), ("window", 3)
    ]  # fmt: skip
    order = METHODS["sliderquant-published"].settings.stage_order
    for row in rows[3:]:
        same = row["settings"]["stage_order"] == order
        assert row.get("same_as") == (f"stage_order sliderquant-published {BASE}" if same else None)
    assert len({row["perplexity"] for row in rows}) == 5
    assert str(tiny_llama.parent) not in file.path.read_text()
    assert "## stage_order" in file.path.with_suffix(".md").read_text()
    assert (tmp_path / "cpu" / "ablations-sliderquant-published.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    capsys.readouterr()
    # What another ablation has in common with it is taken from the file.
    ablate.run(parsed(ablate, "clipping", *words, "--resume"))
    assert len(file.rows()) == len(rows) + 8
    again = [row for row in file.rows() if row.get("ablation") == "clipping" and "same_as" not in row]
    assert [row["label"] for row in again] == ["clipped ranges", "clipped ranges", "none", "none"]


def test_a_model_with_outliers_is_there_until_the_stack_is_left(parsed, calibration_file):
    words = ["rank", "--model", "demo-llama-5m-outliers", "--calibration", calibration_file]
    with ExitStack() as stack:
        place = ablate.place_of(parsed(ablate, *words, "--evaluation", calibration_file), stack)
        norm = load_file(f"{place.model}/model.safetensors")["model.layers.1.input_layernorm.weight"]
        assert norm.float().max() > 15
    assert not Path(place.model).exists()


def test_bad_arguments(parsed, tmp_path):
    with pytest.raises(SystemExit, match="--material"):
        ablate.run(parsed(ablate, "rank", "--material", tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        parsed(ablate, "nothing")
