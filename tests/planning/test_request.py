"""A request holds what was asked for, looked up; and it is made before anything is read."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from sliderquant import pipeline
from sliderquant.errors import InputError
from sliderquant.planning.allocation import Allocation
from sliderquant.planning.methods import METHODS
from sliderquant.planning.request import Request
from sliderquant.schemes import ModelScheme

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(pipeline.quantize).parameters.items()
    if parameter.default is not parameter.empty
}


def request(**arguments):
    return Request.of({"model": "./nowhere", "output": "out", **DEFAULTS, "device": "cpu", **arguments})


def test_names_are_looked_up():
    made = request(scheme="W4A4KV4-g64", method="sliderquant", effort="light", settings={"windows": {"size": 3}})
    assert made.scheme == ModelScheme.parse("W4A4KV4-g64")
    assert made.method is METHODS["sliderquant"]
    assert (made.effort, made.settings.epochs, made.settings.windows.size) == ("light", 2, 3)
    assert made.rotate == ("R1", "R2", "R3", "R4")
    assert made.device == torch.device("cpu")


def test_what_was_not_asked_for_is_the_methods():
    assert request().effort == "default"
    assert request(method="gptq").effort is None
    assert request(method="rtn").settings is None
    assert request(scheme="W4A4", rotate=["R1"]).rotate == ("R1",)
    assert request(scheme="W4A4", rotate=[]).rotate == ()
    assert request(scheme="W4A4", rotate=iter(["R1", "R2"])).rotate == ("R1", "R2")


def test_the_report_says_what_was_asked_for():
    asked = request(method="rtn", calibration=None, model=Path("./nowhere")).as_dict()
    assert (asked["calibration"], asked["model"], asked["method"]) == (None, "nowhere", "rtn")
    assert json.loads(json.dumps(asked)) == asked


def test_the_defaults_of_plan_and_quantize_are_those_of_a_request():
    planned = inspect.signature(pipeline.plan).parameters
    assert {name: DEFAULTS[name] for name in DEFAULTS if name in planned} == {
        name: planned[name].default for name in DEFAULTS if name in planned
    }
    bare = Request("./nowhere", ModelScheme.parse(DEFAULTS["scheme"]), METHODS[DEFAULTS["method"]])
    for name in ("calibration", "samples", "seqlen", "seed", "overwrite", "rotation_seeds", "average_bits"):
        assert getattr(bare, name) == getattr(request(), name) == DEFAULTS[name]


def test_an_allocation_is_a_budget():
    chosen = Allocation(2.5, 4, {}, {})
    assert request(allocation=chosen).average_bits == 2.5
    assert request(allocation=chosen, average_bits=2.5).average_bits == 2.5
    with pytest.raises(InputError, match=r"average_bits 3 with an allocation of at most 2\.5 bits"):
        request(allocation=chosen, average_bits=3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "W5A16"}, "weights of 5 bits are not supported"),
        ({"method": "gtpq"}, "unknown method 'gtpq'.*did you mean gptq"),
        ({"effort": "most"}, "effort 'most': method sliderquant has light, default, best"),
        ({"settings": {"epoch": 3}}, "unknown setting 'epoch': did you mean epochs"),
        ({"device": "tpu"}, "tpu"),
        ({"samples": "4"}, "samples '4': expected a whole number"),
    ],
)
def test_mistakes_are_told_before_the_model_is_looked_for(arguments, message):
    with pytest.raises(InputError, match=message):
        request(**arguments)
    with pytest.raises(InputError, match=message):
        pipeline.quantize("./nowhere", "out", **arguments)
