"""Where the models and texts of the accuracy command are."""

from contextlib import ExitStack

import pytest

from benchmarks.accuracy import ablate
from benchmarks.accuracy import command as accuracy
from sliderquant.calibration.text import read_text


def test_a_model_that_is_not_in_the_material_needs_its_folder(tmp_path, parsed):
    chosen = parsed(accuracy, "--models", "demo-llama-5m", f"SmolLM2-135M={tmp_path}").models
    assert chosen == [("demo-llama-5m", None), ("SmolLM2-135M", str(tmp_path))]
    for word in ("SmolLM2-135M", "SmolLM2-135M=nowhere", "unknown"):
        with pytest.raises(SystemExit):
            parsed(accuracy, "--models", word)
    with pytest.raises(SystemExit, match="give its folder, SmolLM2-135M=FOLDER"):
        ablate.place_of(parsed(ablate, "recipe", "--model", "SmolLM2-135M"), ExitStack())


def test_documents_of_another_domain_are_joined_before_a_slice(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "web.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    text = accuracy.elsewhere_text("data/web.jsonl[:12]", tmp_path, tmp_path)
    assert text.name == "data/web.jsonl[:12]"
    assert read_text(text.source, "evaluation").documents == ("first\n\nsecon",)
    assert accuracy.elsewhere_text("topics[:9]", tmp_path, tmp_path).name == "topics[:9]"
