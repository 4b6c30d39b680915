import json
import re

import pytest
from typer.testing import CliRunner

from sliderquant.cli import app
from sliderquant.evaluation.sensitivity import sensitivity

NAMES = ["sensitivity.html", "sensitivity.json", "sensitivity.png"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["sensitivity", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def options(calibration_file):
    return ("--text", f"{calibration_file}[:3000]", "--seqlen", 48, "--max-blocks", 3, "--scheme", "W2A16-g32")


def test_a_study_from_the_command_line(tiny_llama, calibration_file, options, tmp_path):
    done = invoke(tiny_llama, *options, "-o", tmp_path / "deep" / "out")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    expected = sensitivity(tiny_llama, "W2A16-g32", f"{calibration_file}[:3000]", seqlen=48, max_blocks=3)
    assert json.loads((folder / "sensitivity.json").read_text()) == json.loads(json.dumps(expected.as_dict()))
    assert f"perplexity: {expected.original:.4f} -> {expected.everything.perplexity:.4f}" in done.stdout
    assert f"protocol: {expected.protocol}" in done.stdout
    layer, kind = expected.layers[1], expected.kinds[-1]
    for part in (layer, kind):
        cells = (part.name, part.alone.perplexity, part.all_but.perplexity)
        pattern = r"{}\b.* {:.3f} .* {:.3f} .*{:+.3f}".format(*cells, part.all_but.perplexity_change)
        assert re.search(pattern, done.stdout), (pattern, done.stdout)
    assert all(str(folder / name) in done.stdout for name in NAMES)
    assert "passes through a layer" in done.stderr


def test_a_rotated_model(tiny_llama, calibration_file, options, tmp_path):
    # The last --scheme counts.
    done = invoke(
        tiny_llama, *options, "--scheme", "W4A4KV4", "--rotate", "r1, R2,R3,R4", "--seed", 7, "-o", tmp_path, "-q"
    )
    assert done.exit_code == 0, done.output
    expected = sensitivity(
        tiny_llama, "W4A4KV4", f"{calibration_file}[:3000]", 48, 3, rotate=["R1", "R2", "R3", "R4"], seed=7
    )
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    assert found == json.loads(json.dumps(expected.as_dict()))
    assert found["rotations"].keys() == {"seed", "R1", "R2", "R3", "R4"}
    assert found["rotations"]["seed"] == 7


def test_quiet_shows_no_progress(tiny_llama, options, tmp_path):
    done = invoke(tiny_llama, *options, "-o", tmp_path / "out", "-q")
    assert (done.exit_code, done.stderr) == (0, "")


def test_the_folder_is_named_after_the_model_and_nothing_is_replaced(tiny_llama, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(tiny_llama, *options, "-q").exit_code == 0
    folder = tmp_path / f"sensitivity-{tiny_llama.name}"
    page = folder / "sensitivity.html"
    page.write_text("old")
    (folder / "notes.txt").write_text("mine")
    refused = invoke(tiny_llama, *options, "-q")
    assert refused.exit_code == 2
    assert re.search(r"holds sensitivity.json, .*--overwrite", refused.stderr)
    assert page.read_text() == "old"
    assert invoke(tiny_llama, *options, "-q", "--overwrite").exit_code == 0
    assert page.read_text() != "old"
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", *NAMES]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--scheme", "W4A16-g128"), "groups of 128 do not divide"),
        (("--text", "missing.txt"), "text 'missing.txt': no such file"),
        (("--max-blocks", 0), "max_blocks 0"),
        (("--rotate", "R1,R9"), "rotations R9: expected some of R1, R2, R3, R4"),
        (("--rotate", "r3"), "rotate R3: of use only where queries and keys are quantized, which W2A16-g32 does not"),
    ],
)
def test_wrong_use_leaves_nothing_behind(tiny_llama, options, tmp_path, extra, message):
    done = invoke(tiny_llama, *options, "-o", tmp_path / "out", *extra)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_a_folder(tiny_llama, options, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        done = invoke(tiny_llama, *options, "-o", output)
        assert done.exit_code == 2
        assert f"output {output}: " in done.stderr
