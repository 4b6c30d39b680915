"""Tables and pictures of made-up results of a GPU."""

import json
import sys

import pytest

from benchmarks.kernels import report
from benchmarks.kernels.harness.figures import derive
from benchmarks.kernels.harness.store import write
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.plots import ratios, roofline


@pytest.fixture
def rows(timed_row):
    made = []
    for (n, k), megabytes in (((4096, 4096), 8.7), ((28672, 4096), 61.5)):
        for m in (1, 16, 256, 4096):
            for provider, factor, wider in (("cublas", 1.1, 3.8), ("sliderquant", 1.3, 1), ("humming", 1.5, 1)):
                weight_bytes = megabytes * wider * 1e6
                us = factor * max((weight_bytes + 2 * m * (n + k)) / 4000e3, 2 * m * n * k / 800e6)
                made.append(timed_row(provider, us, shape=f"{n}x{k}", m=m, weight_bytes=weight_bytes))
    absent = {"op": "weight_only_linear", "provider": "mslk", "kind": "provider", "status": "error", "run": 0}
    return [*made, {**absent, "error": "not installed: pip install mslk-cuda==1.1.0", "version": ""}]


@pytest.fixture
def file(tmp_path, rows, run_facts):
    path = tmp_path / "nvidia-test" / "kernels-quick.json"
    path.parent.mkdir()
    runs = {0: run_facts()}
    goals = [goal for op in OPS.values() for goal in op.goals(derive(rows, runs, OPS), runs)]
    content = {"runs": [runs[0]], "rows": rows, "goals": [{**goal._asdict(), "passed": goal.passed} for goal in goals]}
    write(path, content)
    return path


def test_tables(file):
    (written,) = report.report(file, plots=False)
    text = written.read_text()
    assert "| 0 | 2026-01-01T00:00:00+00:00 | NVIDIA Test | 1.2, 1980 MHz | 4000 | - | 800 | 1.50 | torch 2.8 |" in text
    assert "of copy bandwidth | at least 0.75 |" in text
    assert "| pass |" in text
    assert "| not measured |" in text
    lines = [line for line in text.splitlines() if line.startswith("| a layer | 4096x4096 | 1 |")]
    assert [line.split("|")[4].strip() for line in lines] == ["cublas", "sliderquant", "humming"]
    ours = [cell.strip() for cell in lines[1].split("|")]
    assert ours[5] == "2.833"  # 1.3 times 8.7 MB and 16 KB at 4000 GB/s
    assert ours[7] == "77"
    assert ours[10:13] == ["3.21", "1.15", "humming"]
    assert "| mslk | error | not installed: pip install mslk-cuda==1.1.0 | 1 |" in text


def test_reading_is_told_where_it_was_measured(rows, run_facts):
    run = run_facts()
    runs = {0: {**run, "floors": {**run["floors"], "read_gbps": 4200.0}}}
    assert "| 4000 | 4200 | 800 | 1.50 |" in report.markdown("title", runs, derive(rows, runs, OPS), [])
    timed = [row for row in derive(rows, runs, OPS) if row["kind"] == "time"]
    (axes,) = roofline(timed, runs, "title").axes
    assert axes.get_lines()[0].get_label() == "measured: 4200 GB/s, matmul 800 TFLOP/s"


def test_pictures_are_written_and_shown(file):
    table, *pictures = report.report(file)
    assert [path.name for path in pictures] == [
        "kernels-quick-weight_only_linear-W4A16-g128-bf16-roofline.png",
        "kernels-quick-weight_only_linear-W4A16-g128-bf16-ratio.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    assert all(f"![{path.stem}]({path.name})" in table.read_text() for path in pictures)


def test_without_matplotlib_it_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "benchmarks.kernels.plots")
    with pytest.raises(SystemExit, match=r"plots need matplotlib.figure: pip install matplotlib, or .* --no-plots"):
        report.report(file)


def test_roofline_holds_every_row_below_the_roof(rows, run_facts):
    runs = {0: run_facts()}
    timed = [row for row in derive(rows, runs, OPS) if row["kind"] == "time"]
    (axes,) = roofline(timed, runs, "title").axes
    points = [tuple(point) for collection in axes.collections for point in collection.get_offsets()]
    assert len(points) == len(timed)
    assert all(y <= min(x * 4.0, 800) * 1.0001 for x, y in points)
    roof = axes.lines[0].get_xydata()
    assert [y for _, y in roof] == pytest.approx([roof[0][0] * 4.0, 800, 800])
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"cublas", "sliderquant", "humming"}


def test_ratios_have_a_panel_for_each_shape(rows, run_facts):
    runs = {0: run_facts()}
    figure = ratios([row for row in derive(rows, runs, OPS) if row["kind"] == "time"], "title")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["4096x4096", "28672x4096"]
    line = panels[0].lines[1]  # ours; cuBLAS comes first and the line at 1 last
    assert list(line.get_xdata()) == [1, 16, 256, 4096]
    assert line.get_ydata()[0] == pytest.approx(3.8 * 1.1 / 1.3, rel=0.01)


def test_a_file_of_another_schema_is_an_error(file):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "schema": 0}))
    with pytest.raises(ValueError, match="expected schema 1, got 0"):
        report.report(file)
