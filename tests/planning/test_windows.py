from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliderquant.errors import InputError
from sliderquant.planning.windows import schedule


def spans(*args, **kwargs):
    return [(window.start, window.stop - 1) for window in schedule(*args, **kwargs)]


def test_the_published_schedule_of_32_layers():
    expected = [(0, 0), (0, 1), (0, 2), (0, 3)]
    expected += [(i, i + 1) for i in range(3, 28)]
    expected += [(28, 31), (29, 31), (30, 31), (31, 31)]
    assert spans(32) == expected


def test_earlier_methods_are_special_cases():
    assert spans(5, shallow=0, deep=0, size=1, stride=1) == [(i, i) for i in range(5)]
    assert spans(5, shallow=0, deep=0, size=2, stride=1) == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [(0, 0)]),
        (2, [(0, 0), (0, 1), (1, 1)]),
        (3, [(0, 0), (0, 1), (1, 2), (2, 2)]),
        (5, [(0, 0), (0, 1), (0, 2), (2, 3), (3, 4), (4, 4)]),
    ],
)
def test_a_short_model_shrinks_the_ramps(layers, expected):
    assert spans(layers) == expected


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9), st.integers(1, 6), st.data())
def test_every_schedule_covers_every_layer_in_order(layers, shallow, deep, size, data):
    stride = data.draw(st.integers(1, size))
    windows = schedule(layers, shallow, deep, size, stride)
    assert {layer for window in windows for layer in window.layers} == set(range(layers))
    assert windows[0].start == 0
    assert windows[-1].stop == layers
    for before, after in pairwise(windows):
        assert before.start <= after.start <= before.stop
        assert before.stop <= after.stop
    assert len(set(windows)) == len(windows)
    assert all(len(w) <= size for w in windows if w.phase == "middle")


@pytest.mark.parametrize(
    "arguments", [{"num_layers": 0}, {"shallow": -1}, {"size": 0}, {"size": 2, "stride": 3}, {"stride": 0}]
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(InputError, match="windows"):
        schedule(**{"num_layers": 8, **arguments})
