import math

import pytest

from sliderquant.reports.layer_errors import error_figure, error_table, layer_warnings, scale_table

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def layer(index, error=0.1, linears=(0.01, 0.02, 0.03), scales=None, **troubles):
    found = {name: {"error": value, "damping": 0.01} for name, value in zip(KINDS, linears, strict=True)}
    for name in KINDS:
        if name.rpartition(".")[2] in troubles:
            found[name]["trouble"] = troubles[name.rpartition(".")[2]]
    return {"layer": index, "error": error, "linears": found, "scales": scales or {}}


def test_every_error_has_its_place():
    figure = error_figure([layer(0), layer(1, 0.4, (0.1, 0.2, None)), layer(2, 0.2)])
    outputs, linears = figure.axes
    assert [list(line.get_ydata()) for line in outputs.lines] == [[0.1, 0.4, 0.2]]
    assert [line.get_label() for line in linears.lines] == ["q_proj", "o_proj", "down_proj"]
    assert [list(line.get_ydata()) for line in linears.lines[:2]] == [[0.01, 0.1, 0.01], [0.02, 0.2, 0.02]]
    assert math.isnan(linears.lines[2].get_ydata()[1])
    assert len({(line.get_color(), line.get_marker()) for line in linears.lines}) == 3
    assert outputs.get_yscale() == linears.get_yscale() == "log"
    assert [text.get_text() for text in linears.get_xticklabels()] == ["0", "1", "2"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["q_proj", "o_proj", "down_proj"]


def test_errors_of_zero_and_none_are_drawn():
    outputs, linears = error_figure([layer(0, None, (0.0, 0.1, 0.2))]).axes
    assert (outputs.get_yscale(), linears.get_yscale()) == ("linear", "linear")
    assert linears.lines[0].get_ydata()[0] == 0


def test_the_table_has_a_line_for_each_layer():
    headings, lines = error_table([layer(0, 0.12345), layer(1, None, (0.5, None, 1e-5))])
    assert headings == ["layer", "output", "q_proj", "o_proj", "down_proj"]
    assert lines == [(0, "0.123", "0.01", "0.02", "0.03"), (1, "not finite", "0.5", "not finite", "1e-05")]


def test_channel_scales_have_a_line_for_each_site():
    norm, block = {"smallest": 0.5, "largest": 40.0}, {"ratio": 0.25}
    headings, lines = scale_table([layer(0, scales={"input_layernorm": norm}), layer(1, scales={"mlp": block})])
    assert headings == ["layer", "channel scales at", "smallest", "largest", "ratio"]
    assert lines == [(0, "input_layernorm", "0.5", "40", ""), (1, "mlp", "", "", "0.25")]
    assert scale_table([layer(0)])[1] == []


@pytest.mark.parametrize("count", [1, 40])
def test_trouble_of_many_linears_is_one_warning(count):
    trouble = "damping raised to 0.1"
    layers = [layer(index, q_proj=trouble, down_proj=trouble) for index in range(count)]
    places = ", ".join(f"layer {index} (q_proj, down_proj)" for index in range(count))
    assert layer_warnings(layers) == [f"{trouble}: {places}."]


def test_every_matter_is_a_warning_of_its_own():
    layers = [layer(0), layer(1, None, o_proj="X^T X is not finite", q_proj="damping raised")]
    assert layer_warnings(layers) == [
        "Layer 1: the error of its output is not finite.",
        "damping raised: layer 1 (q_proj).",
        "X^T X is not finite: layer 1 (o_proj).",
    ]
    assert layer_warnings([layer(0)]) == layer_warnings([]) == []
