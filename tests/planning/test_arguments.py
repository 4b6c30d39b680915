"""Wrong types are told by the name of the argument, before a model is opened."""

import pytest

import sliderquant
from sliderquant.errors import InputError
from sliderquant.evaluation.models import evaluate
from sliderquant.evaluation.sensitivity import sensitivity

WRONG = {
    "model": [None, 5, b"folder"],
    "output": [5, ["out"]],
    "scheme": [None, 4],
    "method": [None, 5],
    "effort": [2],
    "settings": ["epochs=2", [("epochs", 2)]],
    "calibration": [5, ["a.txt"]],
    "perplexity_on": [5],
    "samples": ["4", 2.5, None, True],
    "seqlen": ["32", 32.0],
    "seed": [None, "2", 1.5, True, -1, 2**63],
    "rotation_seeds": [None, 2.0],
    "average_bits": ["2.5", True],
    "rotate": ["R1", ["R1", 2], 5],
    "overwrite": ["no", 1, None],
    "per_channel_fallback": ["no"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_types(name, value, tmp_path):
    arguments = {"model": "./nowhere", "output": tmp_path / "out", name: value}
    for function in (sliderquant.quantize, sliderquant.plan):
        with pytest.raises(InputError, match=f"^{name} "):
            function(**arguments)


def test_a_checkpoint_needs_a_folder():
    with pytest.raises(InputError, match=r"^output None: expected a folder to write the checkpoint to"):
        sliderquant.quantize("./nowhere", None)


def test_functions_beside():
    for function in (sensitivity, evaluate):
        with pytest.raises(InputError, match=r"^seqlen '32': expected a whole number"):
            function("./nowhere", seqlen="32")


@pytest.mark.parametrize("method", ["gptq", "sliderquant"])
def test_a_text_that_is_needed(method, tiny_llama, tmp_path):
    for function in (sliderquant.quantize, lambda model, output, **rest: sliderquant.plan(model, **rest)):
        with pytest.raises(InputError, match="text None: expected one name or path"):
            function(tiny_llama, tmp_path / "out", scheme="W4A16", method=method, calibration=None)
