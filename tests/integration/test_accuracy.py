"""A real trained model, quantized with less text and fewer epochs than the published figures take."""

import pytest

import sliderquant


@pytest.mark.parametrize(("method", "epochs", "worst"), [("sliderquant", 5, 15), ("sliderquant-published", 10, 60)])
def test_two_bits_of_a_real_model(shared, tmp_path, method, epochs, worst):
    """Rounding to nearest destroys stories260K at 2 bits per channel; refining in sliding windows keeps it talking."""
    model = shared / "models" / "stories260K"
    text = shared / "data" / "tinystories" / "tinystories.txt"
    evaluation = f"{text}[-40000:]"
    original = sliderquant.evaluate(model, evaluation, seqlen=256).value
    rounded = sliderquant.quantize(model, tmp_path / "rtn", scheme="W2A16", method="rtn")
    refined = sliderquant.quantize(
        model,
        tmp_path / "refined",
        scheme="W2A16",
        method=method,
        settings={"epochs": epochs, "windows": {"shallow": 2, "deep": 2}},
        calibration=f"{text}[:400000]",
        samples=64,
        seqlen=128,
    )
    assert 5 < original < 7
    assert sliderquant.evaluate(rounded.path, evaluation, seqlen=256).value > 300
    assert sliderquant.evaluate(refined.path, evaluation, seqlen=256).value < worst
    losses = [entry["losses"] for entry in refined.report["training"]]
    assert all(loss[-1] < loss[0] for loss in losses)


def test_three_bits_of_the_embedded_model(demo_model, tmp_path):
    """Without any text but what Python brings along."""
    settings = {"epochs": 2, "windows": {"shallow": 1, "deep": 1}}
    results = {
        method: sliderquant.quantize(
            demo_model,
            tmp_path / method,
            scheme="W3A16",
            method=method,
            settings=settings if method == "sliderquant" else None,
            calibration="stdlib",
            samples=16,
            seqlen=128,
        )
        for method in ("rtn", "sliderquant")
    }
    text = "topics[:30000]"
    values = {name: sliderquant.evaluate(result.path, text, seqlen=128).value for name, result in results.items()}
    original = sliderquant.evaluate(demo_model, text, seqlen=128).value
    assert original < values["sliderquant"] < values["rtn"]
    assert values["sliderquant"] - original < 0.4 * (values["rtn"] - original)
