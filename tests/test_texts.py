"""The texts of a run as `quantize`, `plan` and the commands see them: found unusable before any work."""

import json
import warnings

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import sliderquant
from sliderquant import pipeline
from sliderquant.cli import app
from sliderquant.errors import InputError
from sliderquant.evaluation.models import evaluate
from sliderquant.evaluation.sensitivity import sensitivity
from sliderquant.progress import Progress

TINY = {"scheme": "W4A16", "method": "gptq", "samples": 2, "seqlen": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def grown(random_model, tmp_path_factory):
    """A model whose tokenizer has a token more than its embedding has rows."""
    folder = random_model(tmp_path_factory.mktemp("grown") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    return folder


class Told(Progress):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_tokens_that_the_model_does_not_have(grown, calibration_file, tmp_path, monkeypatch):
    bad = tmp_path / "bad.txt"
    bad.write_text("Once <|tool|> upon a time there was a girl. " * 60)
    monkeypatch.setattr(pipeline, "quantize_layers", lambda *_: pytest.fail("work began"))
    message = r"token 2048 \('<\|tool\|>'\) is beyond the model's vocabulary of 2048"
    for texts in ({"calibration": str(bad)}, {"calibration": str(calibration_file), "perplexity_on": str(bad)}):
        with pytest.raises(InputError, match=message):
            sliderquant.quantize(grown, tmp_path / "out", **TINY, **texts)
        with pytest.raises(InputError, match=message):
            sliderquant.plan(grown, **TINY, **texts)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
    with pytest.raises(InputError, match=message):
        evaluate(grown, str(bad), seqlen=32, device="cpu")
    with pytest.raises(InputError, match=message):
        sensitivity(grown, "W4A16", str(bad), seqlen=32, device="cpu")


def test_prompts_with_tokens_that_the_model_does_not_have(grown, tmp_path):
    sliderquant.quantize(grown, tmp_path / "out", "W8A16", "rtn", device="cpu")
    for prompt, message in (("Use <|tool|> now", "PROMPT: token 2048"), ("\ud800", "PROMPT is not UTF-8")):
        done = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), prompt])
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
    assert (
        CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "Use it", "--max-new-tokens", "1"]).exit_code == 0
    )
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(InputError, match="no text in it"):
        evaluate(tmp_path / "out", str(tmp_path / "blank.txt"))


def test_too_little_text_is_said_before_work_in_a_plan_and_in_the_report(tiny_llama, calibration_file, tmp_path):
    told = Told()
    result = sliderquant.quantize(
        tiny_llama,
        tmp_path / "out",
        **TINY,
        calibration=calibration_file,
        perplexity_on=calibration_file,
        progress=told,
    )
    warning = told.lines[0]
    assert warning.startswith("warning: ")
    assert "64 tokens of calibration text are little for linears of up to 96 input features" in warning
    assert "use 384 tokens or more, by more --samples" in warning
    assert json.loads((result.path / "sliderquant-report.json").read_text())["warnings"] == [warning]
    assert "little for linears" in (result.path / "sliderquant-report.html").read_text()
    for method in ("cbq", "sliderquant", "sliderquant-published"):
        with pytest.warns(UserWarning, match=f"64 tokens .* are little .* what {method} finds may fit"):
            sliderquant.plan(tiny_llama, **{**TINY, "method": method}, calibration=str(calibration_file))
    with pytest.warns(UserWarning, match="64 tokens of calibration text are little"):
        sliderquant.plan(tiny_llama, **TINY, calibration=str(calibration_file))
    with pytest.warns(UserWarning, match="64 tokens"):  # of a text that is not read
        sliderquant.plan(tiny_llama, **TINY)
    command = ["quantize", str(tiny_llama), "--dry-run", "--method", "gptq", "--scheme", "W4A16", "--samples", "2"]
    shown = CliRunner().invoke(app, [*command, "--seqlen", "32", "--calibration", str(calibration_file)])
    assert "warning: 64 tokens" in shown.stderr
    (tmp_path / "short.txt").write_text(calibration_file.read_text()[:600])
    with pytest.warns(UserWarning, match=r"\(64 samples of 32, which overlap\) .* by a longer text"):
        sliderquant.plan(tiny_llama, **{**TINY, "samples": 64}, calibration=str(tmp_path / "short.txt"))


def test_enough_text_is_no_reason_to_speak(tiny_llama, calibration_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliderquant.plan(tiny_llama, **{**TINY, "samples": 16}, calibration=str(calibration_file))
        sliderquant.plan(tiny_llama, **{**TINY, "method": "rtn"}, calibration="missing.txt")
        sliderquant.plan(tiny_llama, **{**TINY, "samples": 16, "method": "cbq"}, calibration=str(calibration_file))


def test_conversations_from_file_to_checkpoint(random_model, tmp_path):
    folder = random_model(tmp_path / "model")
    chat = [{"role": "user", "content": f"How many apples has item {i}?"} for i in range(2)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(9)))
    with pytest.raises(InputError, match="no chat template"):
        sliderquant.plan(folder, **TINY, calibration=str(tmp_path / "chat.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    told = Told()
    sliderquant.quantize(
        folder, tmp_path / "out", **{**TINY, "seqlen": 64}, calibration=str(tmp_path / "chat.jsonl"), progress=told
    )
    assert "none of its 9 documents is longer than one block of 64 tokens: all are joined" in told.lines[0]


@pytest.mark.parametrize("argument", ["calibration", "perplexity_on"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("A few words.", "shorter than one block of 32"), ("caf\ud8e9", "not UTF-8"), (None, "no such file")],
)
def test_a_plan_finds_what_a_run_would(tiny_llama, calibration_file, tmp_path, argument, content, message):
    if content is not None:
        (tmp_path / "t.txt").write_text(content, encoding="utf-8", errors="surrogatepass")
    texts = {"calibration": str(calibration_file), argument: str(tmp_path / "t.txt")}
    with pytest.raises(InputError, match=message):
        sliderquant.plan(tiny_llama, **TINY, **texts)
    with pytest.raises(InputError, match=message):
        sliderquant.quantize(tiny_llama, tmp_path / "out", **TINY, **texts)
    assert not (tmp_path / "out").exists()
