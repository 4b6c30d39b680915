import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliderquant.errors import InputError
from sliderquant.schemes import BITS, GROUP_SIZES, ModelScheme, Scheme, attention_in_words

weight_only = st.builds(Scheme, st.sampled_from(BITS), st.sampled_from((None, *GROUP_SIZES)), st.booleans())


@st.composite
def low_bit(draw: st.DrawFn) -> Scheme:
    bits, group_size = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from((None, *GROUP_SIZES)))
    symmetric = draw(st.booleans()) or (bits == 8 and group_size is not None)
    return Scheme(bits, group_size, symmetric, draw(st.sampled_from((4, 8))), draw(st.booleans()))


@given(weight_only | low_bit(), st.sampled_from((4, 8, 16)))
def test_name_and_scheme_are_the_same_thing(linear, kv_bits):
    scheme = ModelScheme(linear, kv_bits)
    assert ModelScheme.parse(str(scheme)) == ModelScheme.parse(str(scheme).lower()) == scheme
    assert Scheme.parse(str(linear)) == Scheme.parse(linear) == linear
    assert ModelScheme.parse(linear) == ModelScheme.parse(str(linear)) == ModelScheme(linear)


def test_spellings():
    assert Scheme.parse("W4A16-g128") == Scheme(4, 128, symmetric=False)
    assert Scheme.parse("W2A16") == Scheme.parse("W2A16-channel-asym") == Scheme(2)
    assert str(Scheme(3, 64, symmetric=True)) == "W3A16-g64-sym"
    assert Scheme.parse("W4A4") == Scheme.parse("w4a4-asym-act-asym") == Scheme(4, activation_bits=4)
    assert Scheme.parse("W4A8-sym") == Scheme(4, None, True, 8, activation_symmetric=False)
    assert Scheme.parse("W4A8-act-sym") == Scheme(4, None, False, 8, activation_symmetric=True)
    assert str(Scheme(8, 128, True, 8, True)) == "W8A8-g128-sym-act-sym"
    assert ModelScheme.parse("w4a16kv8-g64") == ModelScheme(Scheme(4, 64), kv_bits=8)
    assert str(ModelScheme(Scheme(4, 32, True, 4, True), kv_bits=4)) == "W4A4KV4-g32-sym-act-sym"


def test_queries_keys_and_values_are_no_part_of_a_linear():
    scheme = ModelScheme.parse("W4A4KV4-act-sym")
    assert scheme.quantizes_attention
    assert scheme.quantizes_activations
    assert scheme.linear == Scheme.parse("W4A4-act-sym")
    with pytest.raises(InputError, match=r"scheme 'W4A4KV4': KV4 is of a model, not of a linear: leave it out"):
        Scheme.parse("W4A4KV4")
    assert attention_in_words(scheme.kv_bits) == "queries, keys and values of 4 bits per token and head, asymmetric"
    assert attention_in_words(ModelScheme.parse("W4A4").kv_bits) == "not quantized"


def test_activations_in_words():
    assert Scheme.parse("W4A16").activations == "not quantized"
    assert Scheme.parse("W4A4-sym").activations == "4 bits per token, asymmetric"
    assert Scheme.parse("W4A8-act-sym").activations == "8 bits per token, symmetric"


def test_activations_take_nothing_in_a_checkpoint():
    for weights, activations in (("W4A16-g64", "W4A4-g64"), ("W2A16-sym", "W2A8-sym-act-sym")):
        assert Scheme.parse(weights).stored_bytes(96, 128) == Scheme.parse(activations).stored_bytes(96, 128)
    assert Scheme.parse("W4A4-g64-act-sym").per_channel() == Scheme.parse("W4A4-act-sym")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "not understood: expected W"),
        ("W4A16-g128-", "not understood"),
        ("W5A16", "weights of 5 bits are not supported"),
        ("W4A16-g100", "groups of 100 are not supported"),
        ("W4A5", "activations of 5 bits are not supported"),
        ("W4A2", "activations of 2 bits are not supported"),
        ("W3A8", "weights of 3 bits take activations of 16 bits only, not of 8: use W3A16"),
        ("W8A8-g128", "weights of 8 bits in groups, .* have no zero-points: add -sym, or leave out -g128"),
        ("W4A16-act-sym", "activations of 16 bits are not quantized: leave out -act-sym"),
        ("W4A4KV3", "queries, keys and values of 3 bits are not supported"),
        ("W4A4-KV4", "not understood"),
        ("W4A4-act-sym-sym", "not understood"),
        ("W4A4sym", "not understood"),
    ],
)
def test_bad_names_say_what_is_expected(text, message):
    for parse in (Scheme.parse, ModelScheme.parse):
        with pytest.raises(InputError, match=message) as caught:
            parse(text)
    assert "W4A16-g128" in str(caught.value)


def test_stored_bytes_count_codes_scales_zero_points_and_shape():
    # 4-bit codes 96*128/2, 96 x 2 bf16 scales, zero-points of 96 rows packed into 12 words x 2 groups, two int64
    assert Scheme(4, 64).stored_bytes(96, 128) == 96 * 64 + 96 * 2 * 2 + 12 * 4 * 2 + 16
    assert Scheme(3, symmetric=True).stored_bytes(5, 33, scale_bytes=4) == 5 * 4 * 4 + 5 * 4 + 16


def test_fitting_group_sizes():
    assert Scheme(4, 128).fitting_group_sizes(192) == (32, 64)
    assert not Scheme(4, 128).fits(192)
    assert Scheme(4).fits(7)
