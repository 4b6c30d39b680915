"""sliderquant demo: the whole product on the model that ships with it, without any download."""

import importlib.resources
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command"]

_RUNS = tuple((scheme, method) for scheme in ("W4A16-g64", "W2A16-g64") for method in ("rtn", "sliderquant"))
_EFFORT = "light"
_CALIBRATION, _EVALUATION = "stdlib", "topics[:80000]"
_SAMPLES, _SEQLEN = 32, 256
_NEW_TOKENS, _ROUNDS = 32, 3
_NEXT = """
Next, on a model of the Hugging Face hub:
  sliderquant quantize meta-llama/Llama-3.2-1B -o llama-w4 --scheme W4A16-g128
  sliderquant eval llama-w4 --perplexity wikitext2
  sliderquant generate llama-w4 "The capital of France is"
"""
_PROMPT = "Return a new list containing all items from the iterable in ascending order."


@dataclass
class _Row:
    """A model of the table: the original, or what a method made of it at a scheme."""

    name: str
    method: str
    folder: Path
    perplexity: float
    bytes: int
    bits: float
    seconds: float | None = None
    tokens_per_second: float = 0.0


@reported
def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the checkpoints.")] = Path("demo-output"),
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Quantize the embedded 5-million-parameter model, compare, and generate from it. Nothing is downloaded."""
    from rich.console import Console

    from sliderquant import pipeline
    from sliderquant.checkpoint import describe
    from sliderquant.cli.progress import shown_progress
    from sliderquant.evaluation.models import evaluate
    from sliderquant.planning.methods import METHODS

    model = importlib.resources.files("sliderquant") / "assets" / "demo-llama-5m"
    with importlib.resources.as_file(model) as folder, shown_progress(quiet, verbose) as progress:

        def perplexity(path: Path) -> float:
            return evaluate(path, _EVALUATION, seqlen=_SEQLEN, device=device, progress=progress).value

        progress.message("the original model: perplexity")
        size = (folder / "model.safetensors").stat().st_size
        rows = [_Row("16 bits", "original", folder, perplexity(folder), size, 16.0)]
        for scheme, method in _RUNS:
            progress.message(f"{scheme} by {method}")
            start = time.perf_counter()
            path = output / f"demo-llama-5m-{scheme}-{method}"
            pipeline.quantize(
                folder,
                path,
                scheme=scheme,
                method=method,
                effort=_EFFORT if METHODS[method].efforts else None,
                calibration=_CALIBRATION,
                samples=_SAMPLES,
                seqlen=_SEQLEN,
                device=device,
                overwrite=True,
                progress=progress,
            )
            seconds = time.perf_counter() - start
            found = describe(path)
            bits = found.quantized_bits_per_weight
            rows.append(_Row(scheme, method, path, perplexity(path), found.total_bytes, bits, seconds))
        progress.message("tokens per second")
        _measure_speed(rows, device)
        best = rows[-1]
        sample = _sample(best.folder, device)
    console = Console()
    console.print(_table(rows))
    console.print(f"\nThe packed {best.name} model goes on from {_PROMPT!r}:\n", markup=False, highlight=False)
    console.print(sample, markup=False, highlight=False)
    report = best.folder / "sliderquant-report.html"
    console.print(f"\ncheckpoint  {best.folder}\nreport      {report}", soft_wrap=True)
    console.print(_NEXT, markup=False, highlight=False, soft_wrap=True)


def _measure_speed(rows: list[_Row], device: str) -> None:
    """Fill in the median speed of decoding, all models in turns, so that a change of the machine's speed hits all."""
    from sliderquant.evaluation.bench_worker import Job, Worker

    workers = [Worker(Job(str(row.folder), device, new_tokens=_NEW_TOKENS)) for row in rows]
    for worker in workers:
        worker.load()
        worker.decode(1)  # the first call compiles and allocates
    rounds = [[worker.decode(1) for worker in workers] for _ in range(_ROUNDS)]
    for row, speeds in zip(rows, zip(*rounds, strict=True), strict=True):
        row.tokens_per_second = statistics.median(speeds)


def _table(rows: list[_Row]) -> "Table":
    from rich.table import Table

    table = Table(title="demo-llama-5m; perplexity on Python's help topics; bits of a quantized weight")
    for heading in ("model", "method", "perplexity", "MB", "bits", "tokens/s", "made in"):
        named = heading in ("model", "method")
        table.add_column(heading, justify="left" if named else "right", no_wrap=named)
    for row in rows:
        table.add_row(
            row.name,
            row.method,
            f"{row.perplexity:.2f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.bits:.2f}",
            f"{row.tokens_per_second:.0f}",
            "" if row.seconds is None else f"{row.seconds:.0f} s",
        )
    return table


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
