"""The seed that the random signs of a model's rotations come from, where several were tried: what each one cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sliderquant.errors import InputError

__all__ = ["RotationChoice", "SeedTrial", "check_rotation_seeds"]


@dataclass(frozen=True)
class SeedTrial:
    """What the model rotated with one seed loses on calibration samples when it is rounded to nearest. Each figure is
    None where it is not finite.

    Attributes:
        output_error: squared error of the last hidden states, which the head reads, over their squares; all tokens.
        kl_divergence: KL(original || rounded) of the distributions of the next token, in nats, mean over all tokens.
        perplexity: of the rounded model.
    """

    seed: int
    output_error: float | None
    kl_divergence: float | None
    perplexity: float | None

    @classmethod
    def measured(cls, seed: int, output_error: float, kl_divergence: float, perplexity: float) -> "SeedTrial":
        """Of figures that may be infinite or not a number."""
        figures = (output_error, kl_divergence, perplexity)
        return cls(seed, *(figure if math.isfinite(figure) else None for figure in figures))

    def __str__(self) -> str:
        if self.output_error is None or self.kl_divergence is None or self.perplexity is None:
            return f"rotation seed {self.seed}: not finite"
        return (
            f"rotation seed {self.seed}: output error {self.output_error:.5f}, KL divergence {self.kl_divergence:.5f}, "
            f"perplexity {self.perplexity:.4f}"
        )


@dataclass(frozen=True)
class RotationChoice:
    """Seeds that were tried, and the one that is used.

    Attributes:
        seed: that with the least output error; of equals, the first.
        samples: of the calibration text, that it was measured on.
        trials: in the order of the seeds.
    """

    seed: int
    samples: int
    trials: tuple[SeedTrial, ...]

    @classmethod
    def of_trials(cls, samples: int, trials: Sequence[SeedTrial]) -> "RotationChoice":
        """Raises InputError when no output error is finite."""
        errors = [(trial.output_error, trial.seed) for trial in trials if trial.output_error is not None]
        if not errors:
            raise InputError(
                f"rotation_seeds {len(trials)}: with none of the seeds {trials[0].seed} to {trials[-1].seed} are the "
                "outputs of the model finite: there is nothing to choose by; look at the model's weights, or leave out "
                "rotation_seeds"
            )
        return cls(min(errors)[1], samples, tuple(trials))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_rotation_seeds(rotation_seeds: int, rotated: bool) -> None:
    """Raises InputError when so many seeds cannot be tried of a model that is rotated, or not."""
    if not isinstance(rotation_seeds, int) or rotation_seeds < 1:
        raise InputError(f"rotation_seeds {rotation_seeds}: expected a whole number of seeds to try, at least 1")
    if rotation_seeds > 1 and not rotated:
        raise InputError(
            f"rotation_seeds {rotation_seeds}: there are no rotations to choose a seed for: name some, such as rotate "
            "R1,R2,R4, or leave out rotation_seeds"
        )
