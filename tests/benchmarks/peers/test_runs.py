"""Methods of other packages, with a stand-in: a script that rounds to nearest, in a process of its own."""

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.accuracy import command as accuracy
from benchmarks.accuracy.command import MODELS, ModelSpec, plan
from benchmarks.accuracy.runs import RunFile
from benchmarks.peers import runs as peer_runs
from benchmarks.peers.runs import PEERS, Peer, PeerError, PeerSettings, peers_in
from sliderquant.calibration.blocks import random_blocks
from sliderquant.calibration.text import read_text
from sliderquant.models.source import open_model
from sliderquant.schemes import ModelScheme

IMPORTS = f"""
import sys
sys.path.insert(0, {str(peer_runs.WORKERS)!r})
import peer_worker
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file

class Model(dict):
    def save_pretrained(self, folder):
        Path(folder).mkdir()
        save_file(dict(self), Path(folder) / "model.safetensors")
"""
ROUNDING = """
def quantize(task, tokens):
    model = Model(load_file(Path(task.model) / "model.safetensors"))
    for name, tensor in model.items():
        if "_proj" in name:
            model[name] = tensor.float()
            width = tensor.shape[1] if task.group_size < 0 else task.group_size
            weight = model[name].view(-1, width)
            low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**task.bits - 1)
            zero = (-low / scale).round()
            weight.copy_(((weight / scale).round() + zero).clamp(0, 2**task.bits - 1).sub(zero) * scale)
    settings = {"tokens": tokens.tolist(), "seed": task.seed, "threads": torch.get_num_threads(), "found": FOUND}
    return peer_worker.Quantized(model, settings)

peer_worker.main(quantize)
"""


@pytest.fixture
def peer(tmp_path):
    """`peer(script, ...)`: a stand-in whose package is one that is installed."""

    def make(script=ROUNDING, name="nearest", package="torch", found="None", **more):
        worker = tmp_path / f"{name}.py"
        worker.write_text(IMPORTS + script.replace("FOUND", found), encoding="utf-8")
        return Peer(name, package, worker, **more)

    return make


@pytest.fixture
def quantized(tiny_llama, calibration_file, tmp_path):
    """`quantized(peer, scheme)`: what the peer answered, and the folder that it wrote."""

    def run(peer, scheme="W2A16", model=tiny_llama):
        output = tmp_path / "output"
        source = str(calibration_file)
        return peer.quantize(peer.settings(), str(model), output, ModelScheme.parse(scheme), source, 3, 32, 5), output

    return run


def test_a_peer_gets_our_tokens_and_the_model_is_read_with_its_own_configuration(
    peer, quantized, tiny_llama, calibration_file
):
    answer, output = quantized(peer())
    expected = random_blocks(
        read_text(str(calibration_file), "calibration"), open_model(tiny_llama).tokenizer(), 3, 32, 5
    )
    assert answer["peer"]["tokens"] == expected.tolist()
    assert (answer["peer"]["seed"], answer["peer"]["threads"], answer["threads"]) == (5, 1, 1)
    assert answer["seconds"] >= 0
    for name in ("config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (tiny_llama / name).read_bytes()
    weight = load_file(output / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert {len(row.unique()) for row in weight} <= {2, 3, 4}


def test_it_runs_by_the_interpreter_that_was_named(peer, quantized, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexport PEER_INTERPRETER=1\nexec {sys.executable} "$@"\n', encoding="utf-8")
    other.chmod(0o755)
    named = peer(found="__import__('os').environ.get('PEER_INTERPRETER')", python=other)
    assert quantized(named)[0]["peer"]["found"] == "1"


def test_options_reach_the_package(peer, quantized):
    assert quantized(peer(found="task.options", options={"iters": 50}))[0]["peer"]["found"] == {"iters": 50}
    assert PEERS["autoround"].options == {}
    assert PEERS["autoround-light"].options == {"iters": 50, "lr": 5e-3}


def test_an_interpreter_reads_nothing_of_ours(peer, quantized, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert quantized(peer(found="'/somewhere' in sys.path"))[0]["peer"]["found"] is False


def test_a_worker_that_fails_shows_its_last_lines_and_the_peer(peer, quantized):
    failing = peer("for i in range(40): print('line', i)\nraise OSError('no room in /some/where/folder | today')")
    with pytest.raises(PeerError) as caught:
        quantized(failing)
    assert str(caught.value).startswith(f"nearest (torch {failing.settings().version}) failed, exit status 1; ")
    assert "\n  Traceback (most recent call last):\n" in str(caught.value)
    assert str(caught.value).endswith("OSError: no room in /some/where/folder | today")
    assert "line 39\n" in str(caught.value)
    assert "line 3\n" not in str(caught.value)
    assert caught.value.reason == "failed"
    assert caught.value.summary == "exit status 1: OSError: no room in folder | today"
    with pytest.raises(PeerError, match="it wrote no answer") as caught:
        quantized(peer("pass"))
    assert caught.value.summary == "it wrote no answer: it printed nothing"


@pytest.mark.parametrize("change", [("task.bits", "3"), ("task.group_size < 0", "False"), ("_proj", "q_proj")])
def test_weights_of_another_scheme_are_no_result(peer, quantized, change):
    """3 bits; groups of 32 in place of whole rows; linears that were left out."""
    wrong = ROUNDING.replace(*change).replace("else task.group_size", "else 32")
    with pytest.raises(PeerError, match=r"layers.0.\S+ has \d+ values in one group, more than the 4 of W2A16"):
        quantized(peer(wrong))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A4", "weights alone"),
        ("W4A16-sym", "zero-points"),
        ("W4A16-g64", "groups of 64 do not divide the 96 inputs of model.layers.0.mlp.down_proj"),
    ],
)
def test_schemes_that_are_skipped(peer, quantized, scheme, message):
    with pytest.raises(PeerError, match=message) as caught:
        quantized(peer("raise SystemExit('it was started')"), scheme)
    assert caught.value.reason == "skipped"


def test_sizes_that_a_peer_leaves_alone(peer, quantized):
    with pytest.raises(PeerError, match=r"64 does not divide: \S+k_proj has 64 inputs and 32 outputs") as caught:
        quantized(peer("raise SystemExit('it was started')", multiple=64))
    assert caught.value.reason == "skipped"
    assert quantized(peer(multiple=32))


def test_groups(peer, quantized):
    _, output = quantized(peer(), "W2A16-g32")
    weight = load_file(output / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert {len(group.unique()) for group in weight.view(-1, 32)} <= {2, 3, 4}
    assert max(len(row.unique()) for row in weight) > 4


def test_versions(peer):
    assert peer().settings() == PeerSettings(package="torch", version=version("torch"))
    assert peer(package="no-such-package").settings().version is None


def test_peers_are_planned_at_every_scheme(peer):
    cases = plan("m", ModelSpec(schemes=("W2A16", "W4A4KV4")), None, ["rtn"], 10, 64, (2, 3), peers=[peer()])
    found = [(case.scheme, case.seed, case.samples) for case in cases if case.method == "nearest"]
    assert found == [("W2A16", 2, 64), ("W2A16", 3, 64), ("W4A4KV4", 2, 64), ("W4A4KV4", 3, 64)]
    assert {case.settings.package for case in cases if case.method == "nearest"} == {"torch"}
    assert "nearest" not in {case.method for case in plan("m", MODELS["demo-llama-5m"], None, ["rtn"], 10, 64, (2,))}


@pytest.fixture
def command(parsed, tiny_llama, calibration_file, monkeypatch):
    """`command(peers, *words)`: the accuracy command on a tiny model; the rows of its file by scheme and method."""

    def run(peers, *words):
        monkeypatch.setattr("benchmarks.peers.runs.PEERS", {peer.name: peer for peer in peers})
        monkeypatch.setattr("benchmarks.accuracy.command.PEERS", {peer.name: peer for peer in peers})
        every = ["--model", tiny_llama, "--calibration", calibration_file, "--evaluation", f"{calibration_file}[:2000]"]
        every += ["--seqlen", 32, "--samples", 3, "--methods", "rtn", "--peers", *(peer.name for peer in peers), *words]
        arguments = parsed(accuracy, *every)
        accuracy.run(arguments)
        rows = RunFile("accuracy-models", arguments.out).rows()
        return {(row["scheme"], row["method"]): row for row in rows}, arguments.out / "cpu" / "accuracy-models.md"

    return run


def test_a_real_run_is_resumed(command, peer, capsys):
    broken = peer("raise OSError('no room | today')", name="broken")
    absent = peer(name="absent", package="no-such-package")
    words = ("--schemes", "W2A16", "W4A4", "--resume")
    short = ROUNDING.replace("tokens.tolist()", "3")
    peers = [peer(short), broken, absent]
    rows, page = command(peers, *words)
    ours, theirs = (rows["W2A16", method] for method in ("rtn", "nearest"))
    # Our scales are rounded to the bf16 of the model.
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=0.01)
    assert theirs["perplexity"] != rows["16 bits", "original"]["perplexity"]
    assert theirs["settings"] == peers[0].settings().model_dump()
    assert (theirs["samples"], theirs["calibration"], theirs["peer"]["tokens"]) == (3, "text.txt", 3)
    assert {name: rows["W2A16", name].get("reason") for name in ("broken", "absent")} == {
        "broken": "failed", "absent": "not installed"
    }  # fmt: skip
    assert {rows["W4A4", name]["reason"] for name in ("nearest", "broken")} == {"skipped"}
    printed, version = capsys.readouterr().out, peers[0].settings().version
    assert f"broken (torch {version}) failed, exit status 1; the last lines that it printed:" in printed
    assert "pip install no-such-package, or --peer-python absent=PATH" in printed
    text = page.read_text()
    assert f"- nearest W2A16 is torch {version}, 1 threads: tokens 3, seed 2" in text
    assert "- nearest W4A4: skipped: nearest is compared where weights alone are quantized, unlike W4A4" in text
    assert "- absent W2A16: not installed: pip install no-such-package" in text
    assert "| failed: exit status 1: OSError: no room \\| today |" in text
    assert "| broken | failed | skipped |" in text
    assert str(Path(sys.executable).parent) not in page.with_suffix(".json").read_text()

    rows = command([peer("raise OSError('again')"), *peers[1:]], *words)[0]
    assert rows["W2A16", "nearest"] == theirs
    assert capsys.readouterr().out.count("is in the file") == 5  # with W4A4 of rtn, rotated too
    # Where it is not installed, its row stays; another version is another run.
    rows = command([dataclasses.replace(peers[0], package="no-such-package")], *words)[0]
    assert rows["W2A16", "nearest"] == theirs
    assert f"the file keeps {theirs['perplexity']:.2f}, of version {version}" in capsys.readouterr().out
    again = command([peer(short, package="numpy")], *words)[0]["W2A16", "nearest"]
    assert (again["settings"]["package"], again["perplexity"]) == ("numpy", theirs["perplexity"])


def test_interpreters_are_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("")
    with pytest.raises(SystemExit, match="there is no interpreter at"):
        peers_in(["autoround"], [f"autoround={python}"])
    python.chmod(0o755)
    found = {peer.name: peer.python for peer in peers_in(PEERS, [f"autoround={python}"])}
    assert found == {name: python if name == "autoround" else Path(sys.executable) for name in PEERS}
    for given in (str(python), f"llm-compressor-gptq={python}"):
        with pytest.raises(SystemExit, match="expected NAME=PATH with a name of autoround"):
            peers_in(["autoround"], [given])
    with pytest.raises(SystemExit, match="--peers, which is empty"):
        peers_in([], [f"autoround={python}"])


def test_workers_are_there_and_import_nothing_of_ours():
    for peer in PEERS.values():
        text = peer.worker.read_text(encoding="utf-8")
        assert "peer_worker.main(quantize)" in text
        assert "import sliderquant" not in text
        assert "from benchmarks" not in text
