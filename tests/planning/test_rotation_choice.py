"""Seeds that were tried: which one is used, and what is refused."""

import json
import math

import pytest

from sliderquant.errors import InputError
from sliderquant.planning.rotation_choice import RotationChoice, SeedTrial, check_rotation_seeds


def trials(*errors, first=3):
    return [SeedTrial.measured(first + place, error, 0.5, 2.0) for place, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("errors", "seed"),
    [
        ((0.3, 0.1, 0.2), 4),
        ((0.3, 0.2, 0.1), 5),
        ((0.2, 0.1, 0.1), 4),
        ((math.nan, 0.3, math.inf), 4),
        ((0.0, 0.0), 3),
    ],
)
def test_the_least_output_error_is_used(errors, seed):
    choice = RotationChoice.of_trials(16, trials(*errors))
    assert (choice.seed, choice.samples) == (seed, 16)
    assert [trial.seed for trial in choice.trials] == list(range(3, 3 + len(errors)))


def test_what_is_not_finite_is_nothing_in_json():
    measured = [SeedTrial.measured(0, math.nan, math.nan, math.inf), SeedTrial.measured(1, 0.5, 0.25, 9.0)]
    choice = RotationChoice.of_trials(4, measured)
    nothing = {"output_error": None, "kl_divergence": None, "perplexity": None}
    found = {"output_error": 0.5, "kl_divergence": 0.25, "perplexity": 9.0}
    expected = {"seed": 1, "samples": 4, "trials": [{"seed": 0, **nothing}, {"seed": 1, **found}]}
    assert json.loads(json.dumps(choice.as_dict(), allow_nan=False)) == expected
    assert [str(trial) for trial in choice.trials] == [
        "rotation seed 0: not finite",
        "rotation seed 1: output error 0.50000, KL divergence 0.25000, perplexity 9.0000",
    ]


def test_nothing_finite_is_refused():
    with pytest.raises(InputError, match="rotation_seeds 2: with none of the seeds 3 to 4 are the outputs"):
        RotationChoice.of_trials(16, trials(math.nan, math.inf))


@pytest.mark.parametrize(
    ("rotation_seeds", "rotated", "message"),
    [
        (0, True, "rotation_seeds 0: expected a whole number of seeds to try, at least 1"),
        (-2, False, "rotation_seeds -2: expected a whole number"),
        (2.5, True, r"rotation_seeds 2\.5: expected a whole number"),
        (8, False, "rotation_seeds 8: there are no rotations to choose a seed for: name some, such as rotate R1"),
    ],
)
def test_numbers_of_seeds_that_cannot_be_tried(rotation_seeds, rotated, message):
    with pytest.raises(InputError, match=message):
        check_rotation_seeds(rotation_seeds, rotated)


def test_numbers_of_seeds_that_can():
    check_rotation_seeds(1, False)
    check_rotation_seeds(1, True)
    check_rotation_seeds(8, True)
