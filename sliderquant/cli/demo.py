"""sliderquant demo: the whole product on the model that ships with it, without any download."""

import importlib.resources
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption

if TYPE_CHECKING:
    from sliderquant.checkpoint import Description

__all__ = ["command"]

# Scheme, method, effort, settings.
_RUNS: tuple[tuple[str, str, str | None, dict[str, Any] | None], ...] = (
    ("W4A16-g64", "rtn", None, None),
    ("W4A16-g64", "sliderquant", None, {"epochs": 6}),
    ("W2A16-g64", "rtn", None, None),
    ("W2A16-g64", "sliderquant", None, {"epochs": 6}),
    ("W2A16-g64", "sliderquant-best", "light", None),
)
_CALIBRATION, _EVALUATION = "stdlib", "topics[:250000]"
_SAMPLES, _SEQLEN = 32, 256
_NEXT = """
Next, on a model of the Hugging Face hub:
  sliderquant quantize meta-llama/Llama-3.2-1B -o llama-w4 --scheme W4A16-g128
  sliderquant eval llama-w4 --perplexity wikitext2
  sliderquant generate llama-w4 "The capital of France is"
"""
_PROMPT = "Return a new list containing all items from the iterable in ascending order."


@reported
def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the checkpoints.")] = Path("demo-output"),
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Quantize the embedded 5-million-parameter model, compare, and generate from it. Nothing is downloaded."""
    from rich.console import Console
    from rich.table import Table

    from sliderquant import pipeline
    from sliderquant.checkpoint import describe
    from sliderquant.cli.progress import shown_progress
    from sliderquant.evaluation.models import evaluate

    model = importlib.resources.files("sliderquant") / "assets" / "demo-llama-5m"
    table = Table(title="demo-llama-5m, perplexity on Python's help topics (lower is better)")
    for heading in ("scheme", "method", "perplexity", "MB on disk", "bits per weight", "seconds"):
        named = heading in ("scheme", "method")
        table.add_column(heading, justify="left" if named else "right", no_wrap=named)
    with importlib.resources.as_file(model) as folder, shown_progress(quiet, verbose) as progress:
        progress.message("the original model: perplexity in 16 bits")
        start = time.perf_counter()
        original = evaluate(folder, _EVALUATION, seqlen=_SEQLEN, device=device, progress=progress)
        size = (folder / "model.safetensors").stat().st_size
        seconds = time.perf_counter() - start
        table.add_row("16 bits", "-", f"{original.value:.2f}", f"{size / 1e6:.2f}", "16.00", f"{seconds:.0f}")
        for scheme, method, effort, settings in _RUNS:
            progress.message(f"{scheme} by {method}")
            start = time.perf_counter()
            path = output / f"demo-llama-5m-{scheme}-{method}"
            pipeline.quantize(
                folder,
                path,
                scheme=scheme,
                method=method,
                settings=settings,
                effort=effort,
                calibration=_CALIBRATION,
                samples=_SAMPLES,
                seqlen=_SEQLEN,
                device=device,
                overwrite=True,
                progress=progress,
            )
            measured = evaluate(path, _EVALUATION, seqlen=_SEQLEN, device=device, progress=progress)
            _add_row(table, scheme, method, measured.value, describe(path), time.perf_counter() - start)
    console = Console()
    console.print(table)
    best = output / "demo-llama-5m-W4A16-g64-sliderquant"
    console.print(f"\nThe packed W4A16-g64 model goes on from {_PROMPT!r}:\n", markup=False, highlight=False)
    console.print(_sample(best, device), markup=False, highlight=False)
    console.print(f"\ncheckpoint  {best}\nreport      {best / 'sliderquant-report.json'}", soft_wrap=True)
    console.print(_NEXT, markup=False, highlight=False, soft_wrap=True)


def _add_row(table: Any, scheme: str, method: str, value: float, found: "Description", seconds: float) -> None:
    table.add_row(
        scheme,
        method,
        f"{value:.2f}",
        f"{found.total_bytes / 1e6:.2f}",
        f"{found.quantized_bits_per_weight:.2f}",
        f"{seconds:.0f}",
    )


def _sample(checkpoint: Path, device: str) -> str:
    """Some text by the packed model; the same every time."""
    import torch
    from transformers import AutoTokenizer

    from sliderquant.loading import load

    model = load(checkpoint, device=device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    torch.manual_seed(0)
    written = model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=80,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(written[0], skip_special_tokens=True)
