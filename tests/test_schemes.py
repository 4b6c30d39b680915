import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliderquant.errors import InputError
from sliderquant.schemes import BITS, GROUP_SIZES, Scheme

schemes = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())


@given(schemes)
def test_name_and_scheme_are_the_same_thing(scheme):
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(str(scheme).lower()) == scheme


def test_spellings():
    assert Scheme.parse("W4A16-g128") == Scheme(4, 128, symmetric=False)
    assert Scheme.parse("W2A16") == Scheme.parse("W2A16-channel-asym") == Scheme(2)
    assert str(Scheme(3, 64, symmetric=True)) == "W3A16-g64-sym"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "not understood: expected W"),
        ("W4A16-g128-", "not understood"),
        ("W5A16", "weights of 5 bits are not supported"),
        ("W4A16-g100", "groups of 100 are not supported"),
        ("W4A4", "activations of 4 bits are not supported"),
    ],
)
def test_bad_names_say_what_is_expected(text, message):
    with pytest.raises(InputError, match=message) as caught:
        Scheme.parse(text)
    assert "W4A16-g128" in str(caught.value)


def test_stored_bytes_count_codes_scales_zero_points_and_shape():
    # 4-bit codes 96*128/2, 96 x 2 bf16 scales, zero-points of 96 rows packed into 12 words x 2 groups, two int64
    assert Scheme(4, 64).stored_bytes(96, 128) == 96 * 64 + 96 * 2 * 2 + 12 * 4 * 2 + 16
    assert Scheme(3, symmetric=True).stored_bytes(5, 33, scale_bytes=4) == 5 * 4 * 4 + 5 * 4 + 16


def test_fitting_group_sizes():
    assert Scheme(4, 128).fitting_group_sizes(192) == (32, 64)
    assert not Scheme(4, 128).fits(192)
    assert Scheme(4).fits(7)
