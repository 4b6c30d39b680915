"""The accuracy command: which runs there are, what is not repeated, what the table and the picture say."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sliderquant
from benchmarks.accuracy import command as accuracy
from benchmarks.accuracy import plot as accuracy_plot
from benchmarks.accuracy.command import MODELS, ModelSpec, plan
from benchmarks.accuracy.runs import Case, Place, RunFile, Text, named_text, outlier_model, run_all, summarize
from benchmarks.accuracy.table import SCHEMES, markdown, order_sentences, summary_of
from sliderquant.planning.methods import METHODS

DEMO, STORIES, OUTLIERS = "demo-llama-5m", "stories260K", "demo-llama-5m-outliers"


def planned(model, schemes=None, methods=METHODS, seeds=(2,), epochs=10):
    return plan(model, MODELS.get(model, ModelSpec()), schemes, methods, epochs, 64, seeds)


def test_every_method_meets_every_scheme_that_it_goes_with():
    cases = planned(DEMO)
    assert cases[0] == Case.original(DEMO)
    for scheme in SCHEMES:
        found = [case.method for case in cases if case.scheme == scheme]
        left_out = {"awq"} if scheme == "W4A4KV4" else {"smoothquant"}
        assert set(found) == set(METHODS) - left_out
    assert len(set(map(str, cases))) == len(cases)


def test_rotated_rows_are_there_once():
    rotated = [(case.method, case.rotation) for case in planned(DEMO, ["W4A4KV4"]) if case.rotation]
    every = ("R1", "R2", "R3", "R4")
    methods = ["sliderquant", "rtn", "gptq", "sliderquant-published"]
    assert rotated == [(method, every) for method in methods]
    alone = planned(DEMO, ["W4A4KV4"], ["sliderquant-published"])
    assert [case.rotation for case in alone[1:]] == [(), every]
    assert not any("R3" in case.rotation for case in planned(DEMO, ["W2A16"]))


def test_a_method_that_rotates_has_a_row_without():
    ours = [case.rotation for case in planned(DEMO, ["W4A4KV4"], ["sliderquant"])[1:]]
    assert ours == [("R1", "R2", "R3", "R4"), ()]
    assert [case.rotation for case in planned(DEMO, ["W2A16"], ["sliderquant"])[1:]] == [()]
    (outliers,) = planned(OUTLIERS, ["W4A4KV4"], ["sliderquant"])[1:]
    assert outliers.rotation == ("R1", "R2", "R3", "R4")


def test_what_depends_on_no_seed_runs_once():
    cases = planned(DEMO, ["W4A4KV4"], ["rtn", "gptq"], seeds=(2, 3))
    assert [(case.method, bool(case.rotation), case.seed) for case in cases[1:]] == [
        ("rtn", False, 2), ("gptq", False, 2), ("gptq", False, 3),
        ("rtn", True, 2), ("rtn", True, 3), ("gptq", True, 2), ("gptq", True, 3),
    ]  # fmt: skip


def test_models_have_their_own_runs():
    stories = planned(STORIES)
    assert "W2A16-g64" not in {case.scheme for case in stories}
    published = next(case for case in stories if case.method == "sliderquant-published")
    assert (published.settings.windows.shallow, published.settings.windows.deep) == (2, 2)
    blocks = next(case for case in stories if case.method == "omniquant")
    assert (blocks.settings.windows.shallow, blocks.settings.windows.deep) == (0, 0)
    outliers = planned(OUTLIERS)
    methods = ["rtn", "smoothquant", "sliderquant", "sliderquant-published"]
    assert [case.method for case in outliers[1:]] == methods
    assert {case.scheme for case in outliers[1:]} == {"W4A4KV4"}
    assert [case.scheme for case in planned("another", ["W4A16-g128"], ["rtn"])] == ["16 bits", "W4A16-g128"]


def test_epochs_are_those_of_learned_methods_alone():
    for case in planned(DEMO, ["W4A4KV4"], epochs=3):
        if case.method != "sliderquant":
            assert getattr(case.settings, "epochs", 3) == 3


def test_a_method_with_efforts_runs_with_each_that_is_asked_for():
    def runs(**more):
        spec = MODELS[DEMO]
        return plan(DEMO, spec, ["W2A16"], ["sliderquant"], 10, 64, (2, 3), **more)[1:]

    assert [(case.label, case.seed) for case in runs()] == [("default effort", 2), ("default effort", 3)]
    several = runs(efforts=("light", "best"))
    assert [(case.label, case.seed) for case in several] == [
        ("light effort", 2), ("light effort", 3), ("best effort", 2), ("best effort", 3)
    ]  # fmt: skip
    epochs = [case.settings.epochs for case in several]
    assert epochs[0] < runs()[0].settings.epochs < epochs[2]
    assert {case.settings.epochs for case in runs(epochs_of_efforts=3)} == {3}
    # There are no ramps to shorten.
    stories = plan(STORIES, MODELS[STORIES], ["W2A16"], ["sliderquant"], 10, 64, (2,), ("light", "default"))
    assert [case.settings.windows.shallow for case in stories[1:]] == [0, 0]


@pytest.fixture
def place():
    return Place("tiny", "/somewhere/tiny", Text("a.txt", "/somewhere/a.txt"), Text("b.txt", "/somewhere/b.txt"), 32)


@pytest.fixture
def measured(monkeypatch):
    """The runs that were really begun; each has a perplexity of its own."""
    begun = []

    def measure(case, place, row):
        begun.append(case)
        return {**row, "perplexity": 10.0 + len(begun), "seconds": 1.0}

    monkeypatch.setattr("benchmarks.accuracy.runs._measured", measure)
    return begun


def test_resuming_repeats_nothing_that_is_in_the_file(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)
    cases = planned("tiny", ["W2A16"], ["rtn", "cbq", "omniquant"])
    run_all(cases[:3], {"tiny": place}, file, resume=False)
    first = file.rows()
    run_all(cases, {"tiny": place}, file, resume=True)
    assert measured == cases
    assert file.rows()[:3] == first
    run_all(cases, {"tiny": place}, file, resume=False)
    assert measured == cases * 2
    assert len(file.rows()) == len(cases)


@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (3,)},
        {"epochs": 4},
    ],
)
def test_resuming_runs_what_differs(tmp_path, place, measured, other):
    file = RunFile("accuracy", tmp_path)
    for changes in ({}, other):
        run_all(planned("tiny", ["W2A16"], ["cbq"], **changes), {"tiny": place}, file, resume=True)
    assert len(measured) == 3
    assert len(file.rows()) == 3


def test_a_row_with_other_settings_or_texts_is_replaced(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)
    case = Case.of("tiny", "W2A16", "sliderquant-published", {}, 10, seed=2, samples=8)
    changed = Case.of("tiny", "W2A16", "sliderquant-published", {"rank": 9}, 10, seed=2, samples=8)
    elsewhere = Place("tiny", "", place.calibration, Text("c.txt", ""), 32)
    for one, at in ((case, place), (changed, place), (changed, elsewhere)):
        run_all([one], {"tiny": at}, file, resume=True)
        (row,) = file.rows()
        assert row["settings"]["rank"] == one.settings.rank
        assert row["evaluation"] == at.evaluation.name
    assert len(measured) == 3


def test_rows_of_other_seeds_stay_as_long_as_nothing_else_changes(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)

    def run(rank, seed):
        case = Case.of("tiny", "W2A16", "sliderquant-published", {"rank": rank}, 10, seed=seed, samples=8)
        run_all([case], {"tiny": place}, file, resume=True)
        return [(row["settings"]["rank"], row["seed"]) for row in file.rows()]

    assert run(9, 2) == [(9, 2)]
    assert run(9, 3) == [(9, 2), (9, 3)]
    assert run(7, 3) == [(7, 3)]


def test_a_row_with_a_setting_that_there_is_no_longer_is_replaced(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)
    case = Case.of("tiny", "W2A16", "sliderquant", {}, 10, seed=2, samples=8)
    run_all([case], {"tiny": place}, file, resume=True)
    (row,) = file.rows()
    file.add({**row, "settings": {**row["settings"], "former": 1}})
    run_all([case], {"tiny": place}, file, resume=True)
    (row,) = file.rows()
    assert "former" not in row["settings"]
    assert len(measured) == 2


def test_the_same_work_under_two_names_is_done_once(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)
    settings = METHODS["sliderquant-published"].settings.model_dump()
    names = ("sliderquant-published", "sliderquant", "cbq")
    cases = [Case.of("tiny", "W2A16", name, settings, 10, seed=2, samples=8) for name in names]
    cases.append(Case.of("tiny", "W2A16", "cbq", {}, 10, seed=2, samples=8, label="its own"))
    run_all(cases, {"tiny": place}, file, resume=False)
    assert measured == [cases[0], cases[3]]
    rows = file.rows()
    assert [row["method"] for row in rows] == [*names, "cbq"]
    assert [row.get("same_as") for row in rows] == [None, names[0], names[0], None]
    assert [row["perplexity"] for row in rows] == [11, 11, 11, 12]


def test_runs_that_fail_are_rows_and_are_tried_again(tmp_path, tiny_llama, calibration_file):
    text = Text("text.txt", str(calibration_file))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(tiny_llama / "config.json", empty)
    place = Place("tiny", str(empty), text, text, 32)
    file = RunFile("accuracy", tmp_path)
    cases = [Case.of("tiny", "W2A16", "gptq", {}, 1, seed=2, samples=2)]
    for _ in range(2):
        run_all(cases, {"tiny": place}, file, resume=True)
        (row,) = file.rows()
        assert "perplexity" not in row
        assert row["error"].startswith("tiny: no *.safetensors in tiny")
    assert f"refused: {row['error']}" in markdown(file.rows())


def test_rows_of_older_files_are_dropped(tmp_path, place, measured):
    file = RunFile("accuracy", tmp_path)
    file.path.parent.mkdir(parents=True)
    file.path.write_text(json.dumps({"rows": [{"model": "tiny", "method": "rtn", "perplexity": 1.0}]}))
    run_all([Case.original("tiny")], {"tiny": place}, file, resume=True)
    assert [row["method"] for row in file.rows()] == ["original"]
    file.path.write_text("{")
    with pytest.raises(SystemExit, match="move it away"):
        file.rows()


def test_texts_are_named_without_the_machine(tmp_path):
    inside = tmp_path / "data" / "a.txt"
    assert named_text(f"{inside}[:9]", tmp_path) == Text("data/a.txt[:9]", f"{inside}[:9]")
    assert named_text(str(inside), tmp_path / "other").name == "a.txt"
    assert named_text("stdlib[:9]", tmp_path).name == "stdlib[:9]"


def test_the_order_holds(run_row):
    rows = [
        run_row("m", "W2A16", method, value)
        for method, value in (("rtn", 300.0), ("omniquant", 74.0), ("cbq", 65.0), ("sliderquant-published", 60.0))
    ]
    rotated = run_row("m", "W2A16", "sliderquant-published", 500.0, rotation="R1")
    labelled = run_row("m", "W2A16", "sliderquant-published", 500.0, label="another")
    (sentence,) = order_sentences(summarize([*rows, rotated, labelled]))
    assert sentence == "m W2A16: order holds: sliderquant-published 60.00 < cbq 65.00 < omniquant 74.00 < rtn 300.00"


def test_the_order_breaks_and_says_where(run_row):
    rows = [
        run_row("m", "W2A16", method, value) for method, value in (("rtn", 70.0), ("omniquant", 74.0), ("cbq", 65.0))
    ]
    (sentence,) = order_sentences(summarize(rows))
    assert sentence == "m W2A16: breaks: omniquant 74.00 is not below rtn 70.00 (not run: sliderquant-published)"
    assert order_sentences(summarize(rows[:1])) == []


@pytest.mark.parametrize(
    ("rounded", "said"),
    [
        (1e3, "order holds: sliderquant, default effort 51.00 < rtn 1000"),
        (50.0, "breaks: sliderquant, default effort 51.00 is not below rtn 50.00"),
    ],
)
def test_with_outliers_ours_comes_before_what_they_ruin(run_row, rounded, said):
    ours = [
        run_row(OUTLIERS, "W4A4KV4", "sliderquant", value, rotation=rotation, label=label, epochs=5)
        for value, rotation, label in (
            (51.0, "R1,R2,R3,R4", "default effort"),
            (9e3, "", "default effort"),
            (9e3, "R1,R2,R3,R4", "light effort"),
        )
    ]
    others = [
        run_row(OUTLIERS, "W4A4KV4", "rtn", rounded),
        run_row(OUTLIERS, "W4A4KV4", "rtn", 9e3, rotation="R1,R2,R3,R4"),
        run_row(OUTLIERS, "W4A4KV4", "sliderquant-published", 9e3),
    ]
    assert order_sentences(summarize([*ours, *others])) == [f"{OUTLIERS} W4A4KV4: {said}"]


def test_means_and_spreads_are_over_seeds(run_row):
    rows = [run_row("m", "W2A16", "cbq", value, seed=seed) for seed, value in ((2, 60.0), (3, 63.0))]
    (row,) = summarize(rows)
    assert (row["perplexity"], row["spread"], row["seeds"]) == (61.5, 3.0, [2, 3])


@pytest.fixture
def table(run_row):
    rotated = {"rotation": "R1,R2,R3,R4"}
    return [
        run_row(DEMO, "W4A4KV4", "rtn", 70.0, **rotated),
        run_row(DEMO, "W4A4KV4", "rtn", 90.0),
        run_row(DEMO, "W2A16", "sliderquant-published", 60.27),
        run_row(DEMO, "W2A16", "cbq", 66.0),
        run_row(DEMO, "16 bits", "original", 40.0, elsewhere={"topics": 30.0}),
        run_row(DEMO, "W4A4KV4", "sliderquant", 44.0, label="default effort", **rotated),
        run_row(DEMO, "W2A16", "sliderquant", 46.0, label="best effort"),
        run_row(DEMO, "W2A16", "sliderquant", 46.0, label="default effort", elsewhere={"topics": 33.0}),
        run_row(DEMO, "W2A16", "sliderquant", 49.0, label="light effort"),
    ]


def test_the_table(table):
    lines = markdown(table).splitlines()
    assert "16 bits: 40.00" in lines
    assert "| method | W2A16 | W4A4KV4 | W4A4KV4, rotated |" in lines
    assert "| rtn |  | 90.00 (12 s) | 70.00 (12 s) |" in lines
    first = lines.index("| sliderquant, light effort | 49.00 (12 s) |  |  |")
    assert lines[first + 1 : first + 3] == [
        "| sliderquant, default effort | 46.00 (12 s) |  | 44.00 (12 s) |",
        "| sliderquant, best effort | 46.00 (12 s) |  |  |",
    ]
    goals = {line.split(" | ")[2]: line for line in lines if line.startswith(f"| {DEMO} | W2A16")}
    assert " | 1.650 | " in goals["cbq"]
    assert "60.26 missed" in goals["sliderquant-published"]
    assert "| 64.96 |" in goals["cbq"]
    assert "47 reached" in goals["sliderquant, default effort"]
    assert "45.5 missed" in goals["sliderquant, best effort"]
    other = lines.index("On another domain than it was calibrated on, topics:")
    assert lines[other + 2] == "16 bits: 30.00"
    assert lines[other + 6] == "| sliderquant, default effort | 33.00 (12 s) |"
    assert any("order holds: sliderquant-published 60.27 < cbq 66.00" in line for line in lines)


def test_goals_are_for_their_budget_alone(run_row):
    assert "60.26 reached" in markdown([run_row(DEMO, "W2A16", "sliderquant-published", 60.26)])
    assert "reached" not in markdown([run_row(DEMO, "W2A16", "sliderquant-published", 50.0, epochs=60)])


def test_the_picture(table, tmp_path, run_row):
    far = run_row(DEMO, "W2A16", "rtn", 4000.0)
    nowhere = run_row(DEMO, "W2A16", "awq", float("inf"))
    figure = accuracy_plot.accuracy_figure(summary_of([*table, far, nowhere]))
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("W2A16", "W4A4KV4")
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
    labels = [label.get_text() for label in second.get_yticklabels()]
    assert labels == ["rtn", "rtn, rotated", "sliderquant, rotated\ndefault effort"]
    widths = [bar.get_width() for bar in second.patches]
    assert widths == pytest.approx([1.25, 0.75, 0.1])
    assert len(first.patches) == 6
    figure.savefig(tmp_path / "a.png")
    assert accuracy_plot.accuracy_figure([]) is not None


def test_a_real_run(parsed, tiny_llama, calibration_file, tmp_path, capsys):
    words = ["--model", tiny_llama, "--calibration", calibration_file, "--evaluation", f"{calibration_file}[:2000]"]
    words += ["--seqlen", 32, "--samples", 4, "--epochs", 1, "--schemes", "w4a4kv4", "--methods", "rtn", "sliderquant"]
    accuracy.run(parsed(accuracy, *words))
    path = tmp_path / "cpu" / "accuracy-models.json"
    text = path.read_text()
    rows = {(row["method"], row["rotation"]): row for row in json.loads(text)["rows"]}
    every = "R1,R2,R3,R4"
    assert list(rows) == [
        ("original", ""), ("rtn", ""), ("sliderquant", every), ("sliderquant", ""), ("rtn", every)
    ]  # fmt: skip
    assert all(row["perplexity"] > 1 for row in rows.values())
    assert rows["sliderquant", every]["settings"]["epochs"] == 1
    assert str(tiny_llama.parent) not in text
    assert str(calibration_file.parent) not in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "| rtn |" in path.with_suffix(".md").read_text()
    capsys.readouterr()
    accuracy.run(parsed(accuracy, *words, "--resume"))
    assert capsys.readouterr().out.count("is in the file") == 5
    assert json.loads(path.read_text())["rows"] == json.loads(text)["rows"]


def test_bad_arguments(parsed, tmp_path, capsys):
    for words, message in (
        (["--quick", "--models", DEMO], "--quick"),
        (["--model", "a", "--models", DEMO], "one of the two"),
        (["--material", tmp_path / "nothing"], "--material"),
    ):
        with pytest.raises(SystemExit, match=message):
            accuracy.run(parsed(accuracy, *words))
    for words, message in ((["--schemes", "W9A16"], "weights of 9 bits"), (["--epochs", 0], "above 0")):
        with pytest.raises(SystemExit):
            parsed(accuracy, *words)
        assert message in capsys.readouterr().err


def test_the_model_with_outliers(tiny_llama, calibration_file):
    """It computes what the model does, with four outlying channels at a norm."""
    text = f"{calibration_file}[:2000]"
    with outlier_model(str(tiny_llama)) as folder:
        plain, changed = (sliderquant.evaluate(model, text, seqlen=32).value for model in (tiny_llama, folder))
        assert changed == pytest.approx(plain, rel=1e-6)
        norms = load_file(f"{folder}/model.safetensors")["model.layers.1.input_layernorm.weight"].float()
        assert (norms > 15).sum() == 4
    assert not Path(folder).exists()
