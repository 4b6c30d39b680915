"""The plan of a run, as `--dry-run` prints it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch

from sliderquant.checkpoint.readers import Reader
from sliderquant.cli.progress import in_words
from sliderquant.devices import machine, resolve_device
from sliderquant.planning.duration import expected_seconds, measured_speed
from sliderquant.planning.plan import Plan
from sliderquant.planning.settings import OneShotSettings, Settings
from sliderquant.schemes import attention_in_words, bits_by_kind

__all__ = ["print_bits", "print_plan", "print_readers"]


def print_bits(by_kind: Mapping[str, str]) -> None:
    """Print the bits of every linear, where they differ: by kind, a digit for each layer."""
    if len(set("".join(by_kind.values()))) == 1:
        return
    for kind, digits in by_kind.items():
        print(f"  {kind:<{max(map(len, by_kind))}}  {digits}")


def print_readers(found: Iterable[Reader]) -> None:
    """Print who reads the checkpoint, and what they do with it: a line for each."""
    for index, reader in enumerate(found):
        print(f"{'' if index else 'readers':<11} {reader}")


def print_plan(plan: Plan, device: str = "auto", text: str = "") -> None:
    """Print what would be done, what would be kept, and what it would take on `device`, whose speed is measured.

    Args:
        text: that it would be calibrated on.
    """
    calibrated = f"calibration {text}{': ' if text else ''}{plan.samples} samples of {plan.seqlen} tokens"
    kinds = Counter(f"{name.split('.', 3)[-1]} {scheme}" for name, scheme in plan.schemes.items())
    print(f"model       {plan.source.name}: {plan.source.num_layers} layers, {plan.source_bytes / 1e9:.3f} GB")
    print(f"scheme      {plan.scheme_in_words}")
    print(f"activations {plan.scheme.linear.activations}")
    print(f"attention   {attention_in_words(plan.scheme.kv_bits)}")
    if plan.rotations is not None:
        print(f"rotations   {', '.join(plan.rotations.transforms)}; {_seed_in_words(plan)}")
        for trial in () if plan.rotation_choice is None else plan.rotation_choice.trials:
            print(f"  {trial}")
    effort = "" if plan.request.effort is None else f", {plan.request.effort} effort"
    print(f"method      {plan.method.name}{effort}: {plan.method.summary}")
    print("quantized   " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    chosen = "" if plan.allocation is None else f"; chosen on {plan.allocation.samples} calibration samples"
    print(
        f"bits        {plan.code_bits_per_weight:.3f} per quantized weight, {plan.bits_per_weight:.3f} with scales and "
        f"zero-points{chosen}"
    )
    print_bits(bits_by_kind(plan.schemes))
    print_readers(plan.readers)
    print("kept        " + ", ".join(plan.kept) + ", norms and biases")
    settings = plan.settings
    if isinstance(settings, OneShotSettings):
        print(f"{calibrated}, batches of {settings.batch_size}")
        print("settings    " + ", ".join(f"{name}={value}" for name, value in settings.model_dump().items()))
    elif settings is not None:
        shares = ", ".join(
            f"{share:.0%} for {settings.epochs_of_stage(stage)} epochs" for stage, share in enumerate(settings.stages)
        )
        print(f"{calibrated}, batches of {settings.batch_size}")
        print(f"windows     {' '.join(map(str, plan.windows))}")
        print(f"stages      {shares} of the input channels; stage order: {settings.stage_order}")
        print(f"steps       {plan.steps}")
        print(f"time        {_expected_time(plan, resolve_device(device))}")
        print("learned     " + ", ".join(_learned(settings, plan)))
    print(
        f"memory      about {plan.memory_bytes / 1e9:.2f} GB where layers are refined, "
        f"{plan.host_memory_bytes / 1e9:.2f} GB of host memory, beside Python, PyTorch (some 0.5 GB) and --perplexity, "
        "which holds the whole model"
    )
    if plan.optimizer_bytes:
        print(f"optimizer   {plan.optimizer_bytes / 1e9:.3f} GB of these: its state, of the largest window")
    print(f"disk        {plan.disk_bytes / 1e9:.3f} GB")


def _expected_time(plan: Plan, device: torch.device) -> str:
    where = machine(device)["device"]
    return f"{in_words(expected_seconds(plan, measured_speed(plan, device)))} of refining on {where}, an estimate"


def _seed_in_words(plan: Plan) -> str:
    assert plan.rotations is not None
    choice = plan.rotation_choice
    if choice is None:
        return f"seed {plan.rotations.seed}"
    return f"seed {choice.seed}, of {len(choice.trials)} tried on {choice.samples} calibration samples"


def _learned(settings: Settings, plan: Plan) -> Iterator[str]:
    if settings.weights:
        yield "an offset of every weight"
    if settings.rank:
        yield f"low-rank terms of rank {settings.rank}"
    if plan.clips_activations:
        yield f"clipping of activations from {settings.activation_clipping_start}"
    if settings.clipping:
        yield f"{'free ends of ranges' if settings.grid == 'free' else 'clipping'} from {settings.clipping_start}"
    if settings.scales.used_with(plan.scheme):
        yield f"channel scales from {settings.scales.start}"
