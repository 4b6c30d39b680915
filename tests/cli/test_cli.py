"""The commands as a user runs them: what they print, where, and their exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from sliderquant import __version__
from sliderquant.cli import app
from sliderquant.planning.methods import METHODS

FAST = ["--set", "epochs=2", "--set", "matmul=float32", "--samples", "4", "--seqlen", "32"]


def invoke(*arguments, **keywords):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **keywords)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, calibration_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    done = invoke("quantize", tiny_llama, "-o", out, "--scheme", "W4A16-g32", "--calibration", calibration_file, *FAST)
    assert done.exit_code == 0, done.output
    assert f"{out}: W4A16-g32 by sliderquant" in done.stdout
    return out


def test_version_and_help():
    assert invoke("--version").stdout.strip() == f"sliderquant {__version__}"
    assert all(name in invoke("--help").stdout for name in ("quantize", "eval", "generate", "inspect", "demo"))


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sliderquant", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"sliderquant {__version__}")


@pytest.mark.parametrize("columns", [80, 200])
def test_help_lists_every_method(columns):
    shown = invoke("quantize", "--help", env={"COLUMNS": str(columns)})
    assert shown.exit_code == 0
    options, _, listed = shown.stdout.partition("\n  Methods:\n")
    # Narrow columns break names at hyphens.
    assert f"{','.join(METHODS)}:seebelow.[default:sliderquant]" in "".join(options.split())
    assert listed.split() == " ".join(f"{name} {method.summary}" for name, method in METHODS.items()).split()


def test_a_run_prints_lines_on_stderr_and_the_result_on_stdout(tiny_llama, calibration_file, tmp_path):
    arguments = ["--calibration", calibration_file, *FAST, "--perplexity", f"{calibration_file}[:6000]"]
    done = invoke("quantize", tiny_llama, "-o", tmp_path / "out", "--scheme", "W4A16", *arguments, "-v")
    assert done.exit_code == 0, done.output
    assert re.search(r"^perplexity: \d+\.\d{4} -> \d+\.\d{4}$", done.stdout, re.MULTILINE)
    assert "layers 0-1, 100% of the channels: loss" in done.stderr
    assert "2 layers written" in done.stderr


def test_quiet_prints_results_only(tiny_llama, tmp_path):
    done = invoke("quantize", tiny_llama, "-o", tmp_path / "out", "--scheme", "W8A16", "--method", "rtn", "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_a_dry_run_refuses_an_output_that_the_run_would_refuse(tiny_llama, tmp_path):
    arguments = ["quantize", tiny_llama, "--method", "rtn", "--scheme", "W4A16-g32", "--dry-run", "-o"]
    assert invoke(*arguments, tmp_path / "new").exit_code == 0
    (tmp_path / "there").write_text("a file")
    for output, message in ((tmp_path / "there", "exists already"), (tiny_llama, "the folder of the model itself")):
        refused = invoke(*arguments, output)
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (tmp_path / "new").exists()


def test_dry_run_prints_the_plan(tiny_llama, tmp_path):
    published = ["--method", "sliderquant-published", "--set", "epochs=4"]
    done = invoke("quantize", tiny_llama, "--scheme", "W4A16-g32", "--dry-run", *published, "--seqlen", "32")
    assert done.exit_code == 0, done.output
    for line in (
        r"scheme +W4A16-g32",
        r"quantized +.*2 x down_proj W4A16-g32|quantized +.*2 x mlp.down_proj W4A16-g32",
        r"kept +model.embed_tokens.weight, norms and biases",
        r"windows +\[0\] \[0\.\.1\] \[1\]",
        r"stages +50% for 2 epochs, 100% for 2 epochs",
        r"steps +516",
        r"time +about [\d.]+ (s|minutes) of refining on cpu \(.*\), an estimate",
        r"memory +about \d+\.\d\d GB",
        r"disk +0\.\d+ GB",
    ):
        assert re.search(line, done.stdout), (line, done.stdout)


def test_efforts_show_in_the_plan(tiny_llama):
    arguments = ["quantize", tiny_llama, "--scheme", "W4A16-g32", "--dry-run", "--seqlen", 32]
    steps = []
    for effort in ("light", "default", "best"):
        shown = invoke(*arguments, "--effort", effort).stdout
        assert re.search(r"^learned +an offset of every weight, free ends of ranges from search$", shown, re.M)
        assert re.search(r"^optimizer +0\.\d+ GB of these", shown, re.M)
        assert re.search(rf"^method +sliderquant, {effort} effort: ", shown, re.M)
        steps.append(int(re.search(r"^steps +(\d+)$", shown, re.M)[1]))
    assert steps == sorted(set(steps))


def test_a_scheme_with_low_bit_activations_from_plan_to_text(tiny_llama, calibration_file, tmp_path):
    arguments = ["quantize", tiny_llama, "--scheme", "W4A8-act-sym", "--method", "rtn"]
    planned = invoke(*arguments, "--dry-run")
    assert re.search(r"^activations 8 bits per token, symmetric$", planned.stdout, re.MULTILINE)
    assert re.search(
        r"^activations not quantized$", invoke(*arguments[:2], "--dry-run", "--scheme", "W4A16").stdout, re.M
    )
    done = invoke(*arguments, "-o", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.output
    shown = invoke("inspect", tmp_path / "out", "--verify").stdout
    assert re.search(r"^activations 8 bits per token, symmetric \(14 linears\)$", shown, re.MULTILINE)
    assert "W4A8-act-sym (14 linears)" in shown
    as_json = json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)
    assert as_json["activations"] == {"8 bits per token, symmetric": 14}
    assert invoke("eval", tmp_path / "out", "--perplexity", calibration_file, "--seqlen", 64, "-q").exit_code == 0
    done = invoke("generate", tmp_path / "out", "Return the", "--max-new-tokens", 5, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    refused = invoke("quantize", tiny_llama, "--scheme", "W3A8", "--dry-run")
    assert refused.exit_code == 2
    assert "weights of 3 bits take activations of 16 bits only" in refused.stderr


def test_settings_come_from_a_file_and_from_the_command_line(tiny_llama, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 6\ngamma: 1\n")
    done = invoke("quantize", tiny_llama, "--scheme", "W4A16-g32", "--dry-run", "--config", path, "--set", "epochs=5")
    assert "100% for 5 epochs" in done.stdout


def test_eval_prints_the_value_and_its_protocol(checkpoint, tiny_llama, calibration_file):
    source = f"{calibration_file}[:6000]"
    for model in (checkpoint, tiny_llama):
        done = invoke("eval", model, "--perplexity", source, "--seqlen", 64, "-q")
        assert re.fullmatch(r"perplexity: \d+\.\d{4}\nprotocol: .*64 tokens.*float32 on cpu\n", done.stdout), (
            done.output
        )
    as_json = json.loads(invoke("eval", checkpoint, "--perplexity", source, "--seqlen", 64, "-q", "--json").stdout)
    assert (as_json["seqlen"], as_json["dataset"]) == (64, source)


def test_generate_goes_on_from_the_prompt(checkpoint):
    done = invoke("generate", checkpoint, "Return the", "--max-new-tokens", 5)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Return the")
    assert re.search(r"\d+ tokens, [\d.]+ a second on cpu", done.stderr)
    again = invoke("generate", checkpoint, "Return the", "--max-new-tokens", 5, "--temperature", 0.9, "--seed", 1)
    assert (
        again.stdout
        == invoke("generate", checkpoint, "Return the", "--max-new-tokens", 5, "--temperature", 0.9, "--seed", 1).stdout
    )


def test_generate_takes_the_original_too(tiny_llama):
    done = invoke("generate", tiny_llama, "Return the", "--max-new-tokens", 5)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Return the")


def test_generate_says_why_it_stopped(checkpoint):
    done = invoke("generate", checkpoint, "Return the", "--max-new-tokens", 1000)
    assert "stopped at 128 tokens, the longest that the model takes" in done.stderr


def test_inspect_and_verify(checkpoint, tmp_path):
    done = invoke("inspect", checkpoint, "--verify")
    assert done.exit_code == 0, done.output
    assert "scheme      W4A16-g32 (14 linears)" in done.stdout
    assert "are what was written" in done.stdout
    assert json.loads(invoke("inspect", checkpoint, "--json").stdout)["schemes"] == {"W4A16-g32": 14}
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    done = invoke("inspect", damaged, "--verify")
    assert done.exit_code == 1
    assert "model.safetensors" in done.stdout
    assert "problems found" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "./nowhere", "-o", "{out}"], "./nowhere: no such folder"),
        (["quantize", "{model}"], "missing option -o OUT"),
        (["quantize", "{model}", "-o", "{out}", "--scheme", "W9A16"], "weights of 9 bits are not supported"),
        (["quantize", "{model}", "-o", "{out}", "--scheme", "W4A16-g32", "--method", "best"], "unknown method 'best'"),
        (["quantize", "{model}", "-o", "{out}", "--scheme", "W4A16-g32", "--set", "x=1"], "unknown setting 'x'"),
        (
            ["quantize", "{model}", "-o", "{out}", "--scheme", "W4A16-g32", "--method", "gptq", "--effort", "best"],
            "method gptq has none: use --method sliderquant",
        ),
        (["quantize", "{model}", "-o", "{out}", "--scheme", "W4A16-g32", "--device", "cuda:77"], "device 'cuda:77'"),
        (["quantize", "{model}", "-o", "{out}", "--scheme", "W4A16-g32", "--calibration", "no.txt"], "no such file"),
        (["quantize", "{model}", "-o", "{model}", "--scheme", "W4A16-g32"], "exists already"),
        (["eval", "{model}", "--perplexity", "no.txt"], "'no.txt': no such file"),
        (["eval", "./nowhere", "--perplexity", "topics"], "./nowhere: no such folder"),
        (["eval", "{model}", "--perplexity", "topics[:3000]", "--dtype", "int8"], "dtype 'int8'"),
        (["generate", "./nowhere", "hello"], "./nowhere: no such folder"),
        (["generate", "{model}", "hello", "--dtype", "int8"], "dtype 'int8'"),
        (["generate", "{checkpoint}", ""], "PROMPT is empty"),
        (["generate", "{untold}", "hello"], "its tokenizer cannot be read from"),
        (["eval", "{untold}", "--perplexity", "topics[:3000]"], "its tokenizer cannot be read from"),
        (["inspect", "./nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tiny_llama, checkpoint, tmp_path, arguments, message):
    untold = shutil.copytree(checkpoint, tmp_path / "untold")
    (untold / "tokenizer.json").write_text('{"version"')
    names = {"out": tmp_path / "out", "model": tiny_llama, "checkpoint": checkpoint, "untold": untold}
    done = invoke(*(argument.format(**names) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("sliderquant: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_wrong_use():
    assert invoke("quantize", "x", "--no-such-option").exit_code == 2
    assert invoke("fly").exit_code == 2


def test_failure_is_exit_code_1_with_a_traceback_only_on_request(tiny_llama, tmp_path, monkeypatch):
    from sliderquant import pipeline

    def broken(*args, **kwargs):
        raise OSError("the disk caught fire")

    monkeypatch.setattr(pipeline, "quantize", broken)
    done = invoke("quantize", tiny_llama, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr == "sliderquant: error: OSError: the disk caught fire (run again with -v for a traceback)\n"
    assert "Traceback" in invoke("quantize", tiny_llama, "-o", tmp_path / "out", "-v").stderr


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing(tiny_llama, calibration_file, tmp_path, kind):
    """The real process, stopped while it refines."""
    command = [sys.executable, "-c", "from sliderquant.cli import main; main()", "quantize", str(tiny_llama)]
    command += ["-o", str(tmp_path / "out"), "--scheme", "W4A16-g32", "--calibration", str(calibration_file)]
    command += ["--samples", "64", "--seqlen", "128", "--set", "epochs=2000", "--set", "compile=never"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # What runs in the background of a shell ignores interrupts, and hands that down.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    line = process.stderr.readline()  # the first line of progress: refining has begun
    assert line.startswith("window 1 of "), line
    assert [path.name.startswith(".out.partial-") for path in tmp_path.iterdir()] == [True]
    time.sleep(0.2)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []
    if kind == signal.SIGINT:
        assert process.returncode == 1
        assert errors.endswith("sliderquant: error: interrupted; nothing was left behind\n")
        assert "Traceback" not in errors
    else:
        assert process.returncode not in (0, 2)


def test_the_demo_shows_the_whole_product(tmp_path, monkeypatch):
    """With less text and fewer epochs than a user gets."""
    from sliderquant.cli import demo

    monkeypatch.setattr(demo, "_EVALUATION", "topics[:6000]")
    monkeypatch.setattr(demo, "_SAMPLES", 3)
    monkeypatch.setattr(demo, "_SEQLEN", 64)
    monkeypatch.setattr(demo, "_NEW_TOKENS", 4)
    done = invoke("demo", "-o", tmp_path / "demo", "-q")
    assert done.exit_code == 0, done.output
    for scheme, method in demo._RUNS:
        row = next(line for line in done.stdout.splitlines() if scheme in line and f" {method} " in line)
        # Perplexity, megabytes, bits, tokens per second, seconds.
        assert re.search(r"\d+\.\d\d +│ +\d\.\d\d +│ +\d\.\d\d +│ +\d+ +│ +\d+ s", row), row
        assert (tmp_path / "demo" / f"demo-llama-5m-{scheme}-{method}" / "sliderquant-report.json").is_file()
    assert re.search(r"16 bits +│ original +│ +\d+\.\d\d +│ +10\.\d\d +│ +16\.00 +│ +\d+ +│", done.stdout)
    assert "goes on from" in done.stdout
    assert "sliderquant quantize meta-llama" in done.stdout
