"""Bits under a budget: against every choice there is."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sliderquant.errors import InputError
from sliderquant.planning import allocation
from sliderquant.planning.allocation import allocate, check_average_bits, choices
from sliderquant.schemes import ModelScheme, Scheme, bits_by_kind

OFFERED = (2, 3, 4, 8)


def spent(sizes, bits):
    return sum(sizes[name] * bits[name] for name in sizes)


def total(losses, bits):
    return math.fsum(losses[name][bits[name]] for name in losses)


@st.composite
def problems(draw):
    parts = range(draw(st.integers(1, 5)))
    unit = draw(st.sampled_from([1, 64, 7]))
    sizes = {f"part {part}": unit * draw(st.integers(1, 40)) for part in parts}
    # Whole numbers: sums are exact in any order. Losses need not fall with the bits.
    losses = {name: {bits: draw(st.integers(0, 1000)) for bits in OFFERED} for name in sizes}
    return sizes, losses, draw(st.integers(20, 80)) / 10


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_choice_is_better(problem):
    sizes, losses, average_bits = problem
    found = allocate(sizes, losses, average_bits)
    limit = round(average_bits * 10) * sum(sizes.values())  # tenths of a bit
    assert list(found) == list(sizes)
    assert 10 * spent(sizes, found) <= limit
    every = (dict(zip(sizes, bits, strict=True)) for bits in itertools.product(OFFERED, repeat=len(sizes)))
    assert total(losses, found) == min(total(losses, bits) for bits in every if 10 * spent(sizes, bits) <= limit)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_more_sums_of_bits_than_are_told_apart_stay_within_the_budget(problem):
    sizes, losses, average_bits = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST_STATES", 16)
        found = allocate(sizes, losses, average_bits)
    assert 10 * spent(sizes, found) <= round(average_bits * 10) * sum(sizes.values())


def test_the_budget_is_what_is_written():
    # 2.3 is less than 23/10 as a float: ten weights have 23 bits all the same.
    sizes = dict.fromkeys("abcdefghij", 1)
    losses = {name: {2: 1.0, 3: 0.0} for name in sizes}
    assert sorted(allocate(sizes, losses, 2.3).values()) == [2] * 7 + [3] * 3


def test_bits_are_not_spent_for_nothing():
    losses = {"a": {2: 1.0, 3: 1.0, 4: 1.0}, "b": {2: 5.0, 3: 2.0, 4: 2.0}}
    assert allocate({"a": 8, "b": 8}, losses, 4) == {"a": 2, "b": 3}


def test_the_bits_of_a_scheme_are_the_fewest():
    assert choices(Scheme.parse("W2A16")) == (2, 3, 4, 8)
    assert choices(Scheme.parse("W4A16-g64")) == (4, 8)
    for scheme, average_bits in (("W2A16", 2), ("W2A16", 8.0), ("W3A16-sym", 3.5), ("W8A16", 8)):
        check_average_bits(ModelScheme.parse(scheme), average_bits)


@pytest.mark.parametrize(
    ("scheme", "average_bits", "message"),
    [
        ("W2A16", 1.9, r"average_bits 1.9 with scheme W2A16: expected 2, .*, to 8, the most that there are$"),
        ("W2A16", 8.1, r"average_bits 8.1 .*: expected 2, .* to 8"),
        ("W3A16-g64", 2.5, r"expected 3, .* to 8, .*; for fewer use a scheme of fewer bits, such as W2A16"),
        ("W2A16", float("nan"), r"average_bits nan .*: expected 2"),
        ("W4A4-g64", 4.5, r"average_bits 4.5 with scheme W4A4-g64: .* weight-only schemes: use one such as W4A16-g64"),
        ("W2A16KV4", 2.5, r"scheme W2A16KV4: .* weight-only"),
    ],
)
def test_budgets_that_cannot_be(scheme, average_bits, message):
    with pytest.raises(InputError, match=message):
        check_average_bits(ModelScheme.parse(scheme), average_bits)


def test_bits_by_kind():
    schemes = {
        "model.layers.10.mlp.up_proj": Scheme(4),
        "model.layers.2.mlp.up_proj": Scheme(3),
        "model.layers.2.self_attn.q_proj": Scheme(2, 64),
        "lm_head": Scheme(8),
    }
    assert bits_by_kind(schemes) == {"mlp.up_proj": "34", "self_attn.q_proj": "2", "lm_head": "8"}
