import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from sliderquant.evaluation.sensitivity import Effect, Part, Sensitivity
from sliderquant.reports import sensitivity as module
from sliderquant.reports.sensitivity import sensitivity_figure, sensitivity_page, thirds, write_sensitivity


def made(layers=7, rotations=None):
    def part(name, seed):
        return Part(
            name, 1000 + seed, Effect(20.0 + seed, float(seed), 0.1, 0.2), Effect(90.0 - seed, -2.0 * seed, 1, 2)
        )

    return Sensitivity(
        model="folder/model <one>",
        scheme="W2A16",
        rotations=rotations,
        linears={"q_proj: W2A16": layers},
        text="topics",
        seqlen=8,
        blocks=2,
        tokens=16,
        tokenizer="T",
        passes=9,
        original=20.0,
        everything=Effect(90.0, 70.0, 1.5, 2.5),
        layers=tuple(part(str(index), index - 1) for index in range(layers)),
        kinds=(part("q_proj", 30), part("k_proj", -3)),
        machine={"device": "cpu"},
        versions={"torch": "2"},
    )


@pytest.mark.parametrize(
    ("layers", "sizes"), [(1, [0, 1, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (7, [2, 3, 2]), (32, [11, 10, 11])]
)
def test_thirds_hold_every_layer_once(layers, sizes):
    found = thirds(layers)
    assert list(found) == ["shallow", "middle", "deep"]
    assert [index for part in found.values() for index in part] == list(range(layers))
    assert [len(part) for part in found.values()] == sizes


def test_the_bars_are_the_changes():
    top, top_kinds, bottom, bottom_kinds = sensitivity_figure(made()).axes
    heights = [[bar.get_height() for bar in axes.patches] for axes in (top, top_kinds, bottom, bottom_kinds)]
    assert heights == [[-1, 0, 1, 2, 3, 4, 5], [30, -3], [-2, 0, 2, 4, 6, 8, 10], [60, -6]]
    assert len({bar.get_facecolor() for bar in top.patches}) == 3
    named = [(text.get_text(), text.get_position()[0]) for text in top.texts]
    assert named == [("shallow third\nmean -0.5", 0.5), ("middle third\nmean 2", 3), ("deep third\nmean 4.5", 5.5)]
    assert [text.get_text() for text in bottom_kinds.get_xticklabels()] == ["q_proj", "k_proj"]
    assert all(axes.get_ylabel() for axes in (top, bottom))


def test_a_model_of_two_layers_has_no_thirds():
    assert not sensitivity_figure(made(2)).axes[0].texts


def test_the_page_holds_every_figure_and_needs_nothing_else():
    page = sensitivity_page(made())
    assert "<h1>model &lt;one&gt; at W2A16" in page
    for cell in ("<td>+5.000</td>", "<td>50.000</td>", "<td>-60.000</td>", "<td>1,030</td>", "90.0000"):
        assert cell in page
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", page)
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 1
    assert ElementTree.fromstring(drawn[0]).get("role") == "img"
    assert page == sensitivity_page(made())


def test_rotations_are_named():
    plain, rotated = made(), made(rotations={"seed": 2, "R1": {"n": 64}, "R3": {"n": 16}})
    assert '<tr><th scope="row">Rotations</th><td>none</td></tr>' in sensitivity_page(plain)
    assert '<tr><th scope="row">Rotations</th><td>R1, R3</td></tr>' in sensitivity_page(rotated)
    titles = [sensitivity_figure(result).get_suptitle() for result in (plain, rotated)]
    assert [title.splitlines()[0].partition("W2A16")[2] for title in titles] == [
        ", rounded to nearest",
        ", rounded to nearest after R1, R3",
    ]


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    result = made()
    assert [path.name for path in write_sensitivity(result, tmp_path)] == [
        "sensitivity.json",
        "sensitivity.png",
        "sensitivity.html",
    ]
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == json.loads(json.dumps(result.as_dict()))
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise OSError("disk full")

    monkeypatch.setattr(module, "sensitivity_figure", lambda _: Broken())
    with pytest.raises(OSError, match="disk full"):
        write_sensitivity(result, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
