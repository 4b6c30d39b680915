import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

import sliderquant
from sliderquant.checkpoint import describe, verify
from sliderquant.reports.quantization import loss_figure, quantization_page, schedule_figure, warnings_of

WINDOWS = [
    {"layers": [0], "phase": "shallow"},
    {"layers": [0, 1], "phase": "middle"},
    {"layers": [1, 2], "phase": "middle"},
    {"layers": [2], "phase": "deep"},
]


def stage(window, fraction=1.0, losses=(4.0, 2.0, 1.0), **changes):
    entry = {**window, "sweep": 0, "fraction": fraction, "losses": list(losses), "retries": 0, "rate_scale": 1.0}
    entry |= {"seconds": 2.0, "tokens_per_second": 500.0}
    return {**entry, "converged": True, **changes}


@pytest.fixture(scope="module")
def finished(tiny_llama, calibration_file, tmp_path_factory):
    return sliderquant.quantize(
        tiny_llama,
        tmp_path_factory.mktemp("run") / "out",
        scheme="W2A16-g32",
        settings={"epochs": 4, "gamma": 0.5, "matmul": "float32"},
        calibration=str(calibration_file),
        samples=16,  # fewer are warned of
        seqlen=32,
        perplexity_on=f"{calibration_file}[:3000]",
        device="cpu",
    )


def without_tags(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<(svg|style).*?</\1>", "", page, flags=re.DOTALL)))


def test_a_checkpoint_has_its_page_under_its_checksums(finished):
    path = finished.path / "sliderquant-report.html"
    page = path.read_text(encoding="utf-8")
    assert page == quantization_page(finished.report)
    # The file has its keys in alphabetical order.
    again = quantization_page(json.loads((finished.path / "sliderquant-report.json").read_text()))
    assert sorted(page.splitlines()) == sorted(again.splitlines())
    assert verify(finished.path).ok
    path.write_text(page.replace("W2A16", "W3A16"), encoding="utf-8")
    assert verify(finished.path).problems == (
        "sliderquant-report.html: changed or damaged: its SHA-256 is not the recorded one",
    )
    path.unlink()
    assert verify(finished.path).problems == ("sliderquant-report.html: missing",)
    path.write_text(page, encoding="utf-8")


def test_the_page_says_what_was_done(finished):
    report = finished.report
    text = without_tags(quantization_page(report))
    before, after = report["perplexity"]["before"]["value"], report["perplexity"]["after"]["value"]
    bits = describe(finished.path).quantized_bits_per_weight
    for words in (
        f"Perplexity {before:.4f} → {after:.4f}",
        f"quantized {after:.4f} {after / before - 1:+.2%}",
        f"{report['source_bytes'] / 1e6:.2f} MB → {report['disk_bytes'] / 1e6:.2f} MB",
        f"Bits per quantized weight {bits:.3f}",
        "mlp.down_proj W2A16-g32 2",
        "Kept as they were: model.embed_tokens.weight, norms and biases.",
        "learning_rates.low_rank 0.001",
        f"torch {report['versions']['torch']}",
        f"total, s {report['seconds']['total']:.1f}",
        f"{report['peak_memory_bytes']['host'] / 1e9:.2f} GB (host)",
    ):
        assert words in text, words
    for entry in report["training"]:
        layers = "–".join(map(str, entry["layers"]))  # noqa: RUF001
        losses = entry["losses"]
        row = f"{layers} {entry['phase']} {entry['fraction']:.0%} 2 {losses[0]:.4g} {losses[-1]:.4g}"
        assert row in text, row
    assert "Warnings" not in text


def test_the_page_needs_nothing_but_itself(finished):
    page = quantization_page(finished.report)
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", page)
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 2
    for svg in drawn:
        assert ElementTree.fromstring(svg).get("aria-label")
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names)) > 0
    referred = re.findall(r'(?:href="|url\()#([^")]*)', page)
    assert referred
    assert set(referred) <= set(names)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_method_without_windows(tiny_llama, calibration_file, tmp_path, method):
    done = sliderquant.quantize(
        tiny_llama,
        tmp_path / "out",
        scheme="W4A16-g32",
        method=method,
        calibration=str(calibration_file),
        samples=2,
        seqlen=32,
        device="cpu",
    )
    text = without_tags((done.path / "sliderquant-report.html").read_text(encoding="utf-8"))
    assert f"No windows were refined: method {method} has none, so there are no loss curves." in text
    assert "Not measured" in text
    drawn = re.findall(r"<svg.*?</svg>", (done.path / "sliderquant-report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert len(drawn) == (method == "gptq")
    assert ("Errors of the layers" in text) == (method == "gptq")
    for entry in done.report["layer_errors"]:
        errors = [entry["error"], *(linear["error"] for linear in entry["linears"].values())]
        assert f"{entry['layer']} {' '.join(f'{error:.3g}' for error in errors)} " in text


def test_trouble_of_linears_is_warned_of(finished):
    entry = {"layer": 3, "error": 0.2, "linears": {"mlp.up_proj": {"error": 0.1, "trouble": "damping raised"}}}
    text = without_tags(quantization_page({**finished.report, "layer_errors": [{**entry, "scales": {}}]}))
    assert "Warnings damping raised: layer 3 (up_proj)." in text


def test_the_schedule_has_a_row_for_each_window():
    (axes,) = schedule_figure(WINDOWS, 3).axes
    boxes = [collection.get_paths()[0].get_extents() for collection in axes.collections]
    assert [(box.x0, box.x1) for box in boxes] == [(-0.5, 0.5), (-0.5, 1.5), (0.5, 2.5), (1.5, 2.5)]
    assert [(box.y0 + box.y1) / 2 for box in boxes] == pytest.approx([0, 1, 2, 3])
    assert len({tuple(collection.get_facecolor()[0]) for collection in axes.collections}) == 3
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("decoder layer", "window, in order")


def test_losses_stand_in_their_windows():
    training = [stage(window, fraction, losses=(8, 4, 2)) for fraction in (0.5, 1.0) for window in WINDOWS]
    absolute, relative, absolute_whole, _ = loss_figure(training).axes
    assert (absolute.get_title(), absolute_whole.get_title()) == tuple(
        f"{share} of the input channels quantized" for share in ("50%", "100%")
    )
    for axes, expected in ((absolute, [8, 4, 2]), (relative, [1, 0.5, 0.25])):
        assert [list(line.get_ydata()) for line in axes.lines] == [expected] * 4
        assert all(place < x < place + 1 for place, line in enumerate(axes.lines) for x in line.get_xdata())
    assert absolute.get_yscale() == "log"


def test_losses_of_zero_are_drawn():
    figure = loss_figure([stage(WINDOWS[0], losses=(0.0, 0.0)), stage(WINDOWS[3], losses=(1.0, 0.5))])
    absolute, relative = figure.axes
    assert absolute.get_yscale() == "linear"
    assert len(relative.lines) == 1


def test_windows_that_went_wrong_are_warned_of(finished):
    training = [
        stage(WINDOWS[0]),
        stage(WINDOWS[1], 0.5, retries=2, rate_scale=0.25),
        stage(WINDOWS[3], losses=[3.0], retries=4, converged=False),
    ]
    assert warnings_of(training) == [
        "Window 0–1, 50% of the channels: started again 2 times after a loss that was not finite, with 0.25 of the "  # noqa: RUF001
        "learning rates.",
        "Window 2, 100% of the channels: no finite loss in 5 attempts; it was left as it was.",
    ]
    text = without_tags(quantization_page({**finished.report, "training": training}))
    assert "Warnings Window 0–1" in text  # noqa: RUF001
