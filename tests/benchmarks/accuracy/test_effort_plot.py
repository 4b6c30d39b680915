"""The picture of efforts: which panels and lines there are, what is at the edge, and that names cover nothing."""

import itertools

import pytest

from benchmarks.accuracy import command as accuracy
from benchmarks.accuracy.effort_plot import effort_figure
from benchmarks.accuracy.table import summary_of
from sliderquant.planning.methods import METHODS, with_overrides
from sliderquant.schemes import ModelScheme

MODEL, OURS = "demo-llama-5m", "sliderquant"


@pytest.fixture
def efforts(run_row):
    """`efforts(scheme, (perplexity, seconds), ...)`: rows of light, default and best effort."""

    def make(scheme, *points, **more):
        rows = []
        for name, (perplexity, seconds) in zip(METHODS[OURS].efforts, points, strict=False):
            epochs = with_overrides(METHODS[OURS], ModelScheme.parse(scheme), {}, name).epochs
            known = {"label": f"{name} effort", "seconds": seconds, "epochs": epochs}
            rows.append(run_row(MODEL, scheme, OURS, perplexity, **{**known, **more}))
        return rows

    return make


@pytest.fixture
def table(run_row, efforts):
    others = {
        "rtn": (308.0, 0.0), "gptq": (113.6, 9.0), "awq": (140.2, 25.0), "omniquant": (74.0, 130.0),
        "cbq": (65.0, 310.0), "sliderquant-published": (60.3, 454.0),
        "autoround": (48.7, 114.0), "llm-compressor-gptq": (111.0, 12.0),
    }  # fmt: skip
    return [
        run_row(MODEL, "16 bits", "original", 40.0),
        *(run_row(MODEL, "W2A16", name, value, seconds=seconds) for name, (value, seconds) in others.items()),
        run_row(MODEL, "W2A16", "cbq", 57.6, seconds=369.0, label="another"),
        run_row(MODEL, "W2A16", "omniquant", 56.9, seconds=390.0, label="another"),
        *efforts("W2A16", (50.0, 35.0), (46.0, 170.0), (45.0, 640.0))[::-1],
        run_row(MODEL, "W4A16", "rtn", 41.8),
    ]


def labels_of(axes):
    return {text.get_text(): text for text in axes.texts if text.get_text()}


def test_a_line_through_the_efforts(table):
    figure = effort_figure(summary_of(table))
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xscale()) == ("W2A16", f"{MODEL}\nperplexity", "log")
    line, *_ = axes.lines
    assert line.get_xydata().tolist() == [[35, 50], [170, 46], [640, 45]]
    names = labels_of(axes)
    assert {f"{OURS}, light 50.00", "default 46.00", "best 45.00", "16 bits 40.00", "rtn 308.00"} <= set(names)
    assert len(names) == len(table) - 1
    original = axes.lines[-1]
    assert (set(original.get_ydata()), original.get_linestyle()) == ({40}, "--")


def test_what_is_far_off_is_at_the_upper_edge(table):
    figure = effort_figure(summary_of(table))
    (axes,) = figure.axes
    top = axes.get_ylim()[1]
    assert top == 40 + 3 * (50 - 40)
    points = {line.get_xdata()[0]: line for line in axes.lines[1:-1]}
    assert [points[x].get_ydata()[0] for x in (0.1, 9, 130, 310)] == [top, top, top, 65]
    assert [points[x].get_marker() for x in (0.1, 12, 114, 310)] == ["^", "^", "D", "o"]
    assert "upper edge" in figure.get_supxlabel()
    near = [row for row in table if row["perplexity"] < top]
    figure = effort_figure(summary_of(near))
    assert 65 < figure.axes[0].get_ylim()[1] < top
    assert "upper edge" not in figure.get_supxlabel()


def test_names_cover_neither_each_other_nor_points(table):
    figure = effort_figure(summary_of(table))
    figure.canvas.draw()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = {name: text.get_window_extent() for name, text in labels_of(axes).items()}
    room = axes.get_window_extent()
    for (one, box), (other, another) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(another), f"{one} covers {other}"
    points = [point for line in axes.lines[:-1] for point in axes.transData.transform(line.get_xydata())]
    for name, box in boxes.items():
        assert not any(box.contains(*point) for point in points), f"{name} covers a point"
        assert room.x0 <= box.x0 < box.x1 <= room.x1, f"{name} is outside"
        assert box.y1 <= room.y1, f"{name} is outside"


def test_efforts_with_other_epochs_or_samples_have_lines_of_their_own(table, efforts):
    changed = efforts("W2A16", (55.0, 20.0), (53.0, 80.0), epochs=3)
    fewer = efforts("W2A16", (58.0, 9.0), samples=8)
    (axes,) = effort_figure(summary_of([*table, *changed, *fewer])).axes
    assert sorted(len(line.get_xdata()) for line in axes.lines[:3]) == [1, 2, 3]
    names = set(labels_of(axes))
    assert f"{OURS}, 3 epochs, 64 samples, light 55.00" in names
    assert f"{OURS}, 8 samples, light 58.00" in names


def test_only_models_and_schemes_with_efforts_have_panels(table, run_row, efforts):
    assert effort_figure([]) is None
    assert effort_figure(summary_of([row for row in table if row["method"] != OURS])) is None
    assert effort_figure(summary_of(efforts("W2A16", (50.0, 35.0)))) is None  # 16 bits are not known
    infinite = efforts("W3A16", (float("inf"), 30.0))
    labelled = run_row(MODEL, "W3A16", "cbq", 50.0, label="light effort")
    rotated = [run_row(MODEL, "W4A4KV4", "gptq", 46.0, rotation="R1", seconds=5.0)]
    rotated += [run_row(MODEL, "W4A4KV4", "gptq", 60.0, epochs=epochs) for epochs in (None, 4)]
    rows = [*table, *infinite, labelled, *rotated, *efforts("W4A4KV4", (44.0, 60.0))]
    first, second = (axes for axes in effort_figure(summary_of(rows)).axes if axes.get_visible())
    assert (first.get_title(), second.get_title()) == ("W2A16", "W4A4KV4")
    assert {"gptq, rotated 46.00", "gptq, 4 epochs 60.00"} <= set(labels_of(second))


def test_the_command_writes_it(parsed, tiny_llama, calibration_file, tmp_path, monkeypatch):
    def measure(case, place, row):
        return {**row, "perplexity": 10.0 + len(str(case)), "seconds": 1.0}

    monkeypatch.setattr("benchmarks.accuracy.runs._measured", measure)
    path = tmp_path / "cpu" / "accuracy-models-effort.png"
    words = ["--model", tiny_llama, "--calibration", calibration_file, "--evaluation", calibration_file]
    words += ["--schemes", "W2A16", "--resume", "--methods", "rtn"]
    accuracy.run(parsed(accuracy, *words))
    assert not path.exists()
    accuracy.run(parsed(accuracy, *words, OURS, "--efforts", *METHODS[OURS].efforts))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
