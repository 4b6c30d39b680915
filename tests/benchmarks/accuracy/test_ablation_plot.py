"""The picture of the ablations: panels, bars from the method as it is, whiskers, what is cut and what has no figure."""

import pytest

from benchmarks.accuracy.ablation_plot import ablation_figure, ablation_figures
from benchmarks.accuracy.ablations import ABLATIONS, BASE, tables_of
from benchmarks.accuracy.runs import summarize


@pytest.fixture
def ablated(run_row):
    """`ablated(name, label, perplexity of each seed, ...)`: rows of one label."""

    def make(name, label, *values, model="m", method="sliderquant-published", **more):
        more = {"ablation": name, "label": label, **more}
        return [run_row(model, "W2A16", method, value, seed=seed, **more) for seed, value in enumerate(values)]

    return make


@pytest.fixture
def table(run_row, ablated):
    return [
        run_row("m", "16 bits", "original", 40.0),
        *ablated("rank", "rank 16", 57.0, 59.0),
        *ablated("rank", "no low-rank term", 66.0),
        *ablated("rank", BASE, 59.0, 61.0),
    ]


def panels_of(rows):
    return [axes for axes in ablation_figure(summarize(rows)).axes if axes.get_visible()]


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_go_from_the_method_as_it_is(table):
    (axes,) = panels_of(table)
    rank = ABLATIONS["rank"]
    assert axes.get_title("left").splitlines() == [
        f"rank: {rank.question}",
        f"sliderquant-published ({rank.base_text})",
        "m, W2A16, 10 epochs, 64 samples (16 bits: 40.00)",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [BASE, "no low-rank term", "rank 16"]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.containers[1].patches + axes.containers[2].patches]
    assert bars == [(60, 6), (60, -2)]
    assert texts_of(axes) == ["60.00, 12 s", "66.00 (+10.0%), 12 s", "58.00 (-3.3%), 12 s"]
    assert list(axes.lines[0].get_xdata()) == [60, 60]
    assert axes.lines[0].get_linestyle() == "-"


def test_whiskers_reach_from_the_least_to_the_largest_seed(table):
    (axes,) = panels_of(table)
    whiskers = [(line.get_xdata().tolist(), line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "|"]
    assert whiskers == [([59, 61], 0), ([57, 59], 2)]
    (row,) = (row for row in summarize(table) if row.get("label") == BASE)
    assert (row["least"], row["most"], row["spread"]) == (59, 61, 2)
    (alone,) = panels_of([row for row in table if row["seed"] in (None, 0)])
    assert not [line for line in alone.lines if line.get_marker() == "|"]


def test_a_bar_that_is_far_longer_than_the_others_is_cut(table, ablated):
    far = ablated("rank", "rank 1", 5000.0, 6000.0)
    figure = ablation_figure(summarize([*table, *far]))
    (axes,) = figure.axes
    # The longest of the others is 6.
    assert axes.containers[2].patches[0].get_width() == 1.25 * 6
    assert axes.get_xlim()[1] < 75
    assert "5500 (+9066.7%), 12 s" in texts_of(axes)
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == ">"] == [2]
    assert "arrow" in figure.get_supxlabel()
    assert "arrow" not in ablation_figure(summarize(table)).get_supxlabel()


def test_models_are_side_by_side_and_ablations_one_below_the_other(table, ablated):
    others = [*ablated("windows", BASE, 60.0), *ablated("rank", BASE, 30.0, model="n"), *ablated("gone", BASE, 9.0)]
    rows = [*others, *table]
    assert [key[:2] for key in tables_of(summarize(rows))] == [
        ("windows", "m"), ("rank", "m"), ("rank", "n"), ("gone", "m")
    ]  # fmt: skip
    places = [axes.get_subplotspec() for axes in panels_of(rows)]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert ["16 bits" in axes.get_title("left") for axes in panels_of(rows)[1:3]] == [True, False]


def test_ablations_of_a_single_panel_stand_in_twos(table, ablated):
    alone = [row for name in ("windows", "ramps", "gamma") for row in ablated(name, BASE, 60.0)]
    both = [*ablated("scales", BASE, 60.0), *ablated("scales", BASE, 30.0, model="n")]
    places = [axes.get_subplotspec() for axes in panels_of([*alone, *both, *ablated("gone", BASE, 9.0)])]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)
    ]  # fmt: skip


def test_every_method_has_a_picture(table, ablated):
    recipe = ablated("schedule", BASE, 44.0, method="sliderquant")
    figures = ablation_figures(summarize([*table, *recipe]))
    panels = {method: len(figure.axes) for method, figure in figures.items()}
    assert panels == {"sliderquant-published": 1, "sliderquant": 1}
    title = figures["sliderquant"].axes[0].get_title("left")
    assert title.splitlines()[1:] == ["sliderquant, m, W2A16, 10 epochs, 64 samples (16 bits: 40.00)"]
    # The 16-bit perplexity is of the model, not of a method.
    assert all("16 bits: 40.00" in figure.axes[0].get_title("left") for figure in figures.values())


def test_rows_without_a_figure_say_so(table, ablated):
    (refused,) = ablated("rank", "rank 1", 0.0, error="no")
    del refused["perplexity"]
    rows = [*table, refused, *ablated("rank", "rank 4", float("inf"))]
    (axes,) = panels_of(rows)
    assert texts_of(axes)[2:4] == ["refused", "not finite"]
    assert len(axes.containers) == 3
    without = [row for row in rows if row.get("label") != BASE]
    (axes,) = panels_of(without)
    # From the best row.
    assert [bar.get_width() for container in axes.containers for bar in container.patches] == [8, 0]
    assert axes.lines[0].get_linestyle() == "None"
    assert len(panels_of([refused])) == 1
    assert ablation_figure([]) is not None
