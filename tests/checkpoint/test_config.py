import pytest
from compressed_tensors.quantization import QuantizationConfig

from sliderquant.checkpoint.config import SchemeLookup, quantization_config, read_entry, sliderquant_entry
from sliderquant.errors import CheckpointError
from sliderquant.schemes import Scheme

GROUPED, CHANNEL = Scheme(3, 64, symmetric=True), Scheme(3)
BASE = quantization_config({"model.layers.0.mlp.up_proj": GROUPED}, ["lm_head"])


def with_weights(**changes: object) -> dict:
    weights = BASE["config_groups"]["group_0"]["weights"] | changes
    return BASE | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def with_activations(**changes: object) -> dict:
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} | changes
    config = with_weights(num_bits=4)
    config["config_groups"]["group_0"]["input_activations"] = activations
    return config


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_trip(bits: int, group_size: int | None, symmetric: bool) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    config = quantization_config({"a.b": scheme}, ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    assert quantization_config({"a.b": scheme}, parsed.ignore) == config
    lookup = SchemeLookup(config, "here")
    assert lookup.find("model.layers.7.mlp.up_proj") == scheme
    assert lookup.find("lm_head") is None


def test_what_is_written_is_what_the_format_says() -> None:
    assert BASE == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 3,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                },
            }
        },
    }


INT8 = "W8A8-sym-act-sym"


def test_products_of_integers_that_vllm_has_are_int_quantized() -> None:
    """vLLM finds its int8 kernels by the format, and takes no packed words for them."""
    config = quantization_config({"a.b": Scheme.parse(INT8)}, ["lm_head"])
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "int-quantized"
    assert group["weights"] | {"group_size": None} == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False
    }  # fmt: skip
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
    }  # fmt: skip
    for other in ("W8A8", "W8A8-sym", "W8A8-act-sym", "W8A8-g64-sym-act-sym", "W8A16-sym", "W4A8-sym-act-sym"):
        assert quantization_config({"a.b": Scheme.parse(other)}, [])["format"] == "pack-quantized", other


def test_two_formats() -> None:
    schemes = {"a.b": Scheme.parse("W8A8-g64-sym-act-sym"), "a.c": Scheme.parse(INT8)}
    config = quantization_config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    QuantizationConfig.model_validate(config)
    lookup = SchemeLookup(config, "here")
    assert {name: lookup.find(name) for name in schemes} == schemes
    assert [lookup.format_of(name) for name in ("a.b", "a.c", "a.d")] == ["pack-quantized", "int-quantized", None]
    assert lookup.as_written == config


@pytest.mark.parametrize("named", ["int-quantized", "naive-quantized"])
def test_int_quantized_of_other_tools(named: str) -> None:
    """The format stands outside of the groups alone, and what sliderquant would pack may be in it."""
    config = {**with_activations(), "format": named}
    config["config_groups"]["group_0"]["weights"] |= {"num_bits": 4, "observer": "minmax"}
    lookup = SchemeLookup(config, "here")
    assert lookup.find("a.b") == Scheme.parse("W4A8-g64-sym-act-sym")
    assert lookup.format_of("a.b") == "int-quantized"
    written = lookup.as_written
    assert written["format"] == written["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert written["config_groups"]["group_0"]["weights"] == config["config_groups"]["group_0"]["weights"]
    assert config["format"] == named  # what was given has not changed
    assert SchemeLookup(written, "here").find("a.b") == lookup.find("a.b")


def test_a_preset_of_another_tool() -> None:
    """By the name of a preset, a group is a list of targets."""
    config = BASE | {"format": "int-quantized", "config_groups": {"W8A8": ["Linear"]}}
    lookup = SchemeLookup(config, "here")
    assert str(lookup.find("a.b")) == INT8
    assert lookup.as_written == config
    packed = SchemeLookup(BASE | {"config_groups": {"W8A8": ["Linear"]}}, "here").as_written
    assert SchemeLookup(packed, "here").format_of("a.b") == "int-quantized"


@pytest.mark.parametrize("scheme", ["W4A4", "W4A8-g64-sym", "W2A8-act-sym", "W8A8", "W8A8-g128-sym-act-sym", INT8])
def test_activations_round_trip(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    config = quantization_config({"a.b": parsed}, ["lm_head"])
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": parsed.activation_bits,
        "type": "int",
        "symmetric": parsed.activation_symmetric,
        "strategy": "token",
        "dynamic": True,
    }
    assert config["config_groups"]["group_0"]["output_activations"] is None
    QuantizationConfig.model_validate(config)
    assert SchemeLookup(config, "here").find("model.layers.7.mlp.up_proj") == parsed


def test_schemes_that_differ_in_activations_alone_go_by_name() -> None:
    schemes = {name: Scheme.parse(name) for name in ("W4A16", "W4A4", "W4A8", "W4A4-act-sym")}
    lookup = SchemeLookup(quantization_config({f"a.{name}": scheme for name, scheme in schemes.items()}, []), "here")
    for name, scheme in schemes.items():
        assert lookup.find(f"a.{name}") == scheme


def test_two_schemes_go_by_name() -> None:
    config = quantization_config({"a.up": GROUPED, "a.down": CHANNEL, "b.up": GROUPED}, [])
    assert [group["targets"] for group in config["config_groups"].values()] == [["a.up", "b.up"], ["a.down"]]
    lookup = SchemeLookup(config, "here")
    assert [lookup.find(name) for name in ("a.up", "a.down", "b.up", "b.down")] == [GROUPED, CHANNEL, GROUPED, None]
    assert lookup.explicit_names == ["a.up", "b.up", "a.down"]


def test_configurations_of_other_tools() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    narrow = weights | {"num_bits": 8, "strategy": "channel", "group_size": None, "actorder": "static"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.9.4",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None},
            "group_1": {"targets": ["re:.*down_proj$"], "weights": narrow},
        },
    }
    lookup = SchemeLookup(config, "here")
    assert lookup.find("model.layers.0.mlp.up_proj") == Scheme(4, 128, symmetric=True)
    assert lookup.find("model.layers.0.mlp.down_proj") == Scheme(8, None, symmetric=True)
    assert lookup.find("model.layers.0.mlp.gate") is None
    assert lookup.explicit_names == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BASE | {"quant_method": "gptq"}, "quant_method is 'gptq', expected 'compressed-tensors'"),
        (BASE | {"quantization_status": "frozen"}, "quantization_status is 'frozen', expected 'compressed'"),
        (BASE | {"config_groups": {}}, "config_groups is empty"),
        (BASE | {"config_groups": {"group_0": {"targets": "x"}}}, "not a quantization_config"),
        (BASE | {"transform_config": {"config_groups": {"R3": {}}}}, "online rotations are not supported"),
        (BASE | {"kv_cache_scheme": {"num_bits": 8}}, "quantized KV cache is not supported"),
        (
            BASE | {"format": "marlin-24", "config_groups": with_weights()["config_groups"]},
            "config_groups.group_0.format is 'marlin-24', expected 'pack-quantized' or 'int-quantized'",
        ),
        (with_weights(num_bits=5), "5 bits, group_size 64 is not supported"),
        (with_weights(group_size=16), "3 bits, group_size 16 is not supported"),
        (with_weights(type="float", num_bits=8), "expected static integer weights"),
        (with_weights(strategy="tensor", group_size=None), "strategy is 'tensor', expected 'group' or 'channel'"),
        (
            BASE
            | {
                "config_groups": {
                    "group_0": BASE["config_groups"]["group_0"]
                    | {"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}
                }
            },
            "input_activations: 8 bits with weights of 3 bits, .* is not supported",
        ),
        (with_activations(num_bits=6), "input_activations: 6 bits with weights of 4 bits, .* is not supported"),
        (with_activations(type="float"), "input_activations: expected dynamic integers per token"),
        (with_activations(strategy="tensor"), "input_activations: expected dynamic integers per token"),
        (with_activations(strategy="tensor", dynamic=False), "input_activations: expected dynamic integers per token"),
        (
            BASE
            | {
                "config_groups": {
                    "group_0": BASE["config_groups"]["group_0"]
                    | {"output_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}
                }
            },
            "output_activations: quantized outputs are not supported",
        ),
    ],
)
def test_what_is_not_supported_says_so(config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        SchemeLookup(config, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json")


def test_what_runs_round_trips() -> None:
    config = {
        "sliderquant": sliderquant_entry(None, 8),
        "quantization_config": quantization_config({"a.b": CHANNEL}, [], online=True),
    }
    assert config["quantization_config"]["quant_method"] == "sliderquant"
    assert read_entry(config, "here") == (None, 8, False)
    config["sliderquant"] = sliderquant_entry(None, 16, True)
    assert read_entry(config, "here") == (None, 16, True)
    plain = {"sliderquant": sliderquant_entry(), "quantization_config": quantization_config({"a.b": CHANNEL}, [])}
    assert read_entry(plain, "here") == (None, 16, False)
    clipped = plain | {"sliderquant": sliderquant_entry(clipped=True)}
    with pytest.raises(CheckpointError, match=r"quant_method is 'compressed-tensors', but .* clippings"):
        read_entry(clipped, "here")
    clipped["sliderquant"]["activation_clipping"] = [0.9]
    with pytest.raises(CheckpointError, match=r"here: sliderquant\.activation_clipping is \[0\.9\], expected true or"):
        read_entry(clipped, "here")


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (None, "here: quant_method is 'sliderquant', but sliderquant describes none that are computed"),
        (
            {"bits": 3, "symmetric": False},
            r"here: sliderquant\.attention is .*3.*, expected .*'bits': 4.* or .*'bits': 8",
        ),
        ({"bits": 4}, "expected"),
        ({"bits": 4, "symmetric": True}, "expected"),
        (4, "sliderquant.attention is 4"),
    ],
)
def test_damaged_descriptions_of_attention(attention, message) -> None:
    config = {
        "sliderquant": sliderquant_entry() | {"attention": attention},
        "quantization_config": quantization_config({"a.b": CHANNEL}, [], online=True),
    }
    with pytest.raises(CheckpointError, match=message):
        read_entry(config, "here")
