"""Which seed the signs of a model's rotations come from: of several, the one with which rounding loses least.

Random signs differ in how well they spread outliers, and at 4 bits a model shows it. For each seed the rotated model is
rounded to nearest, weights and, as the scheme says, activations, queries, keys and values; its last hidden states on
some calibration samples are held against those of its original. Their error sums over all channels of all tokens;
cross-entropy and KL divergence, which are measured too, are one number a token. One walk over the model a seed, a layer
in memory at a time.
"""

import torch
from torch import Tensor

from sliderquant.evaluation.variants import Study, Variant, switched_kinds
from sliderquant.models.decoder import Decoder
from sliderquant.planning.memory import CHOOSING_STREAM_GB
from sliderquant.planning.plan import Plan
from sliderquant.planning.rotation_choice import RotationChoice, SeedTrial
from sliderquant.progress import Progress
from sliderquant.rotations.folded import RotatedSource

__all__ = ["choose_rotation_seed"]


def choose_rotation_seed(
    plan: Plan, blocks: Tensor, device: torch.device, progress: Progress | None = None
) -> RotationChoice:
    """Try the seed of the plan's rotations and those that follow, `rotation_seeds` of the request in all.

    Args:
        blocks: calibration tokens int64 `[samples, seqlen]`, of which the first are used.

    Raises:
        InputError: the model puts out nothing finite with any seed; or as `RotatedSource.weight`.
    """
    progress = progress or Progress()
    source, samples = plan.source, plan.measured_samples
    assert isinstance(source, RotatedSource)
    layers, kinds = source.num_layers, frozenset(switched_kinds(plan))
    original: Variant = (frozenset(),) * layers
    rounded: Variant = (kinds,) * layers
    first = source.rotations.seed
    trials: list[SeedTrial] = []

    def passed(done: int, total: int) -> None:
        progress.layer_passed(len(trials) * total + done, plan.request.rotation_seeds * total)

    with torch.no_grad():
        for seed in range(first, first + plan.request.rotation_seeds):
            tried = plan.with_rotation_seed(seed)
            decoder = Decoder(tried.source, device)
            study = Study(tried, decoder, blocks[:samples], (original, rounded), CHOOSING_STREAM_GB * 1e9, device)
            sums = study.run(passed)[rounded]
            trials.append(SeedTrial.measured(seed, sums.output_error, sums.kl_divergence, sums.perplexity))
            progress.message(str(trials[-1]))
    return RotationChoice.of_trials(samples, trials)
