"""What a plan leaves open until there is calibration text: the seed of the rotations, and the bits of every linear."""

import torch
from torch import Tensor

from sliderquant.choosing.bits import choose_bits
from sliderquant.choosing.rotation_seeds import choose_rotation_seed
from sliderquant.devices import deterministic
from sliderquant.models.decoder import Decoder
from sliderquant.planning.plan import Plan
from sliderquant.progress import Progress

__all__ = ["with_chosen_bits", "with_chosen_rotation"]


def with_chosen_rotation(plan: Plan, blocks: Tensor, device: torch.device, progress: Progress) -> Plan:
    """The plan for the model rotated with the seed that loses least.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`.
    """
    assert plan.rotations is not None
    names, seeds = ", ".join(plan.rotations.transforms), plan.request.rotation_seeds
    progress.message(
        f"choosing the seed of the rotations {names}: {seeds} seeds, with each the model rounded to nearest against "
        f"its original on {plan.measured_samples} calibration samples; the run takes about {_memory(plan)}"
    )
    with deterministic(device):
        choice = choose_rotation_seed(plan, blocks, device, progress)
    progress.message(f"rotation seed {choice.seed} is used")
    return plan.with_rotation_choice(choice)


def with_chosen_bits(plan: Plan, blocks: Tensor, device: torch.device, progress: Progress) -> Plan:
    """The plan with the bits that lose least within its budget.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`.
    """
    takes = _memory(plan)
    if plan.file_bytes:
        takes += f", and meanwhile {plan.file_bytes / 1e9:.2f} GB of temporary files"
    progress.message(
        f"choosing the bits of every linear, at most {plan.average_bits:g} on average: gradients of the loss on "
        f"{plan.measured_samples} calibration samples; the run takes about {takes}"
    )
    decoder = Decoder(plan.source, device)
    with deterministic(device):
        return plan.with_allocation(choose_bits(plan, decoder, blocks, device, progress))


def _memory(plan: Plan) -> str:
    return (
        f"{plan.memory_bytes / 1e9:.2f} GB where layers are refined, {plan.host_memory_bytes / 1e9:.2f} GB of host "
        "memory"
    )
