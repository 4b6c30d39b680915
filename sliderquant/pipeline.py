"""From a model to a checkpoint: the functions that a user calls."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sliderquant.baselines.rtn import rtn_layer
from sliderquant.baselines.walk import quantize_layers
from sliderquant.checkpoint import CardInfo, CheckpointWriter
from sliderquant.checkpoint.staging import resolved
from sliderquant.choosing.plans import with_chosen_bits, with_chosen_rotation
from sliderquant.devices import deterministic, machine, peak_memory, versions
from sliderquant.errors import CheckpointError, InputError
from sliderquant.evaluation.models import evaluation_dtype, original_perplexity
from sliderquant.evaluation.perplexity import Perplexity, perplexity
from sliderquant.loading import load
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import ModelSource, open_model
from sliderquant.planning.allocation import Allocation
from sliderquant.planning.plan import Plan, make_plan
from sliderquant.planning.precision import matmul_dtype
from sliderquant.planning.request import Request
from sliderquant.progress import LayerReport, Progress, WindowReport
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.refine.layer import merged_layer, stored_clips
from sliderquant.refine.sweep import refine_model
from sliderquant.reports.quantization import quantization_page
from sliderquant.rotations.folded import rotated
from sliderquant.schemes import ModelScheme, Scheme
from sliderquant.texts import calibration_in_words, needed_texts, read_blocks, say, try_texts

__all__ = ["QuantizeResult", "plan", "quantize"]


@dataclass(frozen=True)
class QuantizeResult:
    """A finished run: `load()` gives the model, `perplexity` what was measured.

    Attributes:
        path: folder of the checkpoint.
        plan: what was done.
        report: the contents of sliderquant-report.json.
    """

    path: Path
    plan: Plan = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def load(self, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Any:
        """The quantized model, ready to generate: `sliderquant.load(self.path, ...)`."""
        return load(self.path, device=device, dtype=dtype)

    @property
    def perplexity(self) -> dict[str, float] | None:
        """`before` and `after`, when they were asked for."""
        measured = self.report["perplexity"]
        return None if measured is None else {name: measured[name]["value"] for name in ("before", "after")}


def plan(
    model: str | Path,
    scheme: str | Scheme | ModelScheme = "W4A16-g128",
    method: str = "sliderquant",
    settings: Mapping[str, Any] | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    per_channel_fallback: bool = False,
    rotate: Sequence[str] | None = None,
    seed: int = 2,
    average_bits: float | None = None,
    calibration: str = "wikitext2",
    device: str | torch.device = "auto",
    effort: str | None = None,
    rotation_seeds: int = 1,
    progress: Progress | None = None,
    perplexity_on: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Plan:
    """What `quantize` with the same arguments would do. Of the model it reads headers only; but with `average_bits` it
    chooses the bits of every linear, which takes two walks over the model, and with `rotation_seeds` a seed, which
    takes one for each. Texts are read and checked; `wikitext2` and `c4`, which are downloaded, only for such choices.

    Raises:
        InputError: as `quantize`.
    """
    return _plan(Request.of(locals()), progress)


def _plan(request: Request, progress: Progress | None) -> Plan:
    settled = _settled(request)
    if request.output is not None:
        _writer(settled)
    texts = needed_texts(settled)
    tokenizer = settled.source.tokenizer() if any(texts) else None
    if not settled.chooses:
        say(try_texts(settled, tokenizer, *texts, request.seed), progress)
        return settled
    found = read_blocks(settled, tokenizer, *texts, request.seed)
    say(found.notes, progress)
    assert found.calibration is not None
    settled.source.check_values()
    return _choose(settled, found.calibration, progress or Progress(), {})


def quantize(
    model: str | Path,
    output: str | Path,
    scheme: str | Scheme | ModelScheme = "W4A16-g128",
    method: str = "sliderquant",
    settings: Mapping[str, Any] | None = None,
    calibration: str = "wikitext2",
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 2,
    device: str | torch.device = "auto",
    perplexity_on: str | None = None,
    overwrite: bool = False,
    per_channel_fallback: bool = False,
    rotate: Sequence[str] | None = None,
    average_bits: float | None = None,
    allocation: Allocation | None = None,
    effort: str | None = None,
    rotation_seeds: int = 1,
    progress: Progress | None = None,
    command: str | None = None,
) -> QuantizeResult:
    """Quantize a causal language model and write a checkpoint.

    Args:
        model: local folder, or id on the Hugging Face hub.
        output: folder to write; it appears only when it is complete.
        scheme: for example `"W4A16-g128"`, see `sliderquant.schemes`.
        method: a name from `sliderquant.planning.methods.METHODS`.
        settings: hyper-parameters that differ from the method's, nested: `{"epochs": 10, "windows": {"shallow": 2}}`.
        calibration: text to calibrate on, see `sliderquant.calibration.text`.
        samples: calibration samples.
        seqlen: tokens of a sample; None: 2048, or the model's maximum when that is shorter.
        seed: of the calibration crops, the order of the samples, the low-rank start and the signs of rotations. The
            same seed on the same machine gives a bit-identical checkpoint.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        perplexity_on: text to measure perplexity on before and after, in blocks of `seqlen`; None: not measured.
        overwrite: replace a checkpoint in `output`.
        per_channel_fallback: linears whose input size the group does not divide get one scale per channel.
        rotate: rotations to fold into the model first, of `"R1"` to `"R4"`, see `sliderquant.rotations`. R3 and R4 are
            computed while the model runs: only sliderquant reads such a checkpoint, or one with quantized attention.
            None: those of the method, of most none.
        average_bits: linears get different bits, those of the scheme or more, with at most so many for a weight on
            average, scales and zero-points not counted: those that lose least, see `sliderquant.choosing.bits`. For
            weight-only schemes. None: all get the bits of the scheme.
        allocation: bits of every linear that were chosen before, `plan(..., average_bits=2.5).allocation`, in place of
            `average_bits`.
        effort: of methods that trade minutes for accuracy: `"light"`, `"default"` or `"best"`; `settings` win.
        rotation_seeds: seeds of the rotations' signs to try, `seed` and those that follow: with that which loses least
            when the model is rounded to nearest the model is rotated, see `sliderquant.choosing.rotation_seeds`. 1:
            `seed`, and nothing is measured.
        progress: is told how far the run is.
        command: the command line, for the model card.

    Raises:
        InputError: something in the arguments or files is not usable; before any long work.
        CheckpointError: the checkpoint could not be written.
    """
    request = Request.of(locals())
    if request.output is None:
        raise InputError("output None: expected a folder to write the checkpoint to")
    return _quantize(request, progress, command)


def _quantize(request: Request, told: Progress | None, command: str | None) -> QuantizeResult:
    progress = told or Progress()
    started = time.perf_counter()
    settled, target = _settled(request), request.device
    source = settled.source
    calibration, evaluation = needed_texts(settled)
    tokenizer = source.tokenizer() if calibration or evaluation else None
    writer = _writer(settled)
    texts = read_blocks(settled, tokenizer, calibration, evaluation, request.seed)
    blocks = texts.calibration
    say(texts.notes, told)
    if calibration or evaluation:
        source.check_values()  # without text, rounding finds it about as soon
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    times: dict[str, float] = {}
    measured: dict[str, Perplexity] = {}
    changed: dict[str, torch.Tensor] = {}
    with writer:
        if evaluation:
            progress.message(f"perplexity of the original on {evaluation}")
            with _timed(times, "evaluate_before"):
                measured["before"] = original_perplexity(
                    source, tokenizer, evaluation, settled.seqlen, target, progress, blocks=texts.evaluation
                )
        if settled.chooses:
            assert blocks is not None
            settled = _choose(settled, blocks, progress, times)
        progress.run_started(settled.steps, settled.work)
        with _timed(times, "refine"), deterministic(target):
            reports = _run(settled, blocks, writer, changed, progress)
        with _timed(times, "write"):
            _copy_the_rest(settled, changed, writer)
            kv_bits = settled.scheme.kv_bits
            folder = writer.write_model(source.stored_config, source.folder, settled.rotations, kv_bits)
        if evaluation:
            progress.message(f"perplexity of the packed model on {evaluation}")
            with _timed(times, "evaluate_after"):
                packed = load(folder, device=target, dtype=evaluation_dtype(source.dtype, target))
                measured["after"] = perplexity(
                    packed, tokenizer, evaluation, settled.seqlen, progress.evaluated, texts.evaluation
                )
                del packed
        times["total"] = time.perf_counter() - started
        report = {
            **settled.as_dict(),
            "calibration": calibration,
            "warnings": list(texts.notes),
            "seed": request.seed,
            "matmul": _matmul(settled, target),
            "training": [window.as_dict() for window in reports if isinstance(window, WindowReport)],
            "layer_errors": [layer.as_dict() for layer in reports if isinstance(layer, LayerReport)],
            "perplexity": {name: result.as_dict() for name, result in measured.items()} or None,
            "seconds": {name: round(seconds, 3) for name, seconds in times.items()},
            "peak_memory_bytes": peak_memory(target),
            "machine": machine(target),
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        name, effort = request.method.name, request.effort
        card = CardInfo(
            base_model=source.name,
            method=name if effort is None else f"{name}, {effort} effort",
            calibration=calibration_in_words(settled, calibration) if calibration else "",
            command=command or "",
            perplexity={evaluation: (measured["before"].value, measured["after"].value)} if evaluation else {},
        )
        path = writer.publish(report, card, quantization_page(report))
    return QuantizeResult(path, settled, report)


def _settled(request: Request) -> Plan:
    """The plan, from the headers of the model's files."""
    source = rotated(open_model(request.model), request.rotate, request.seed, request.scheme)
    return make_plan(source, request)


def _choose(settled: Plan, blocks: torch.Tensor, progress: Progress, times: dict[str, float]) -> Plan:
    """The plan with what it leaves open."""
    if settled.chooses_rotation:
        with _timed(times, "choose_rotation"):
            settled = with_chosen_rotation(settled, blocks, settled.request.device, progress)
    if settled.chooses_bits:
        with _timed(times, "choose_bits"):
            settled = with_chosen_bits(settled, blocks, settled.request.device, progress)
    return settled


def _writer(settled: Plan) -> CheckpointWriter:
    """Nothing is written yet. Raises InputError when the checkpoint cannot be written to `output`."""
    request = settled.request
    assert request.output is not None
    _check_apart(settled.source, request.output)
    return CheckpointWriter(request.output, overwrite=request.overwrite, estimated_bytes=settled.largest_disk_bytes)


def _check_apart(source: ModelSource, output: str | Path) -> None:
    """Writing, or overwriting, `output` leaves the model alone. Raises InputError when it would not."""
    model, out = source.folder.resolve(), resolved(output)
    if model == out:
        raise InputError(f"output {output} exists already and is the folder of the model itself: choose another folder")
    if out in model.parents:
        raise InputError(f"output {output} holds the folder of the model, {model}: choose another folder")


def _run(
    settled: Plan,
    blocks: torch.Tensor | None,
    writer: CheckpointWriter,
    changed: dict[str, torch.Tensor],
    progress: Progress,
) -> Sequence[WindowReport | LayerReport]:
    """Quantize every layer and hand it to the writer, in order; `changed` takes in what else the method changed."""
    source, device, engine = settled.source, settled.request.device, settled.method.engine

    def write(
        index: int,
        quantized: Mapping[str, tuple[QuantizedWeight, torch.Tensor]],
        dense: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        for name, (stored, trained) in quantized.items():
            on_host = QuantizedWeight(*(None if part is None else part.cpu() for part in stored))  # type: ignore[arg-type]
            writer.add_quantized(name, on_host, settled.schemes[name], trained.cpu())
        changed.update({name: tensor.cpu() for name, tensor in (dense or {}).items()})
        progress.layer_written(index + 1, source.num_layers)

    def emit(index: int, layer: nn.Module) -> None:
        full = source.layers[index].full
        quantized, dense = merged_layer(layer)
        write(
            index,
            {full(name): merged for name, merged in quantized.items()},
            {full(name): tensor for name, tensor in dense.items()},
        )
        for name, clip in stored_clips(layer).items():
            writer.add_clip(full(name), clip.cpu())

    if engine == "rounding":
        for index in range(source.num_layers):
            write(index, rtn_layer(source, index, settled.schemes, device))
        return []
    assert blocks is not None
    decoder = Decoder(source, device)
    if engine == "layers":
        return quantize_layers(settled, decoder, blocks, device, write, progress)
    return refine_model(settled, decoder, blocks, settled.request.seed, device, emit, progress)


def _copy_the_rest(settled: Plan, changed: Mapping[str, torch.Tensor], writer: CheckpointWriter) -> None:
    """Everything that is not a quantized weight goes into the checkpoint as it is, or as the method changed it: by full
    name, norms and biases with values that the tensor's dtype holds.

    Raises:
        CheckpointError: a changed tensor is not one of the model's, or is not what would be stored.
    """
    quantized = {f"{name}.weight" for name in settled.schemes}
    unknown = sorted(changed.keys() - (settled.source.files.keys() - quantized))
    if unknown:
        raise CheckpointError(f"tensor {unknown[0]} was changed, but is not one that the model keeps as it is")
    for name in settled.source.files:
        if name in quantized:
            continue
        tensor = settled.source.finite_tensor(name)
        if name in changed:
            stored = changed[name].to(tensor.dtype)
            if not torch.equal(stored.float(), changed[name].float()):
                raise CheckpointError(f"tensor {name}: its changed values are not ones that {tensor.dtype} holds")
            tensor = stored
        writer.add_tensor(name, tensor)


def _matmul(settled: Plan, device: torch.device) -> str | None:
    if settled.method.engine != "windows":
        return None
    dtype = matmul_dtype(settled.learning, device, settled.source.config.hidden_size)
    return str(dtype).removeprefix("torch.")


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start
