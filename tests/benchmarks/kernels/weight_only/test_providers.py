"""Adapters of peers: their packing, what they refuse, and their call on a stand-in that reads the peer's own format.

The stand-ins are what the peers document: a wrong nibble, transposition or zero-point in an adapter is a wrong result.
"""

import types

import pytest
import torch
from torch.nn.functional import linear

from benchmarks.kernels import weight_only
from benchmarks.kernels.harness.case import Case, Unsupported
from benchmarks.kernels.harness.checking import compare
from benchmarks.kernels.weight_only import PROVIDERS
from benchmarks.kernels.weight_only.providers import bitsandbytes, conch, ours, torch_int4, torchao
from sliderquant_kernels.common import choices, workspace
from sliderquant_kernels.weight_only import tiles

SCHEMES = ["W4A16-g128", "W4A16-g64-sym", "W2A16-g128", "W8A16", "W3A16-g32"]


def _operands(scheme="W4A16-g128", dtype="bf16", shape=(128, 256), m=3):
    case = Case(weight_only.NAME, "test", shape, m, scheme, dtype)
    operands = weight_only.operands(case, torch.device("cpu"))
    return operands, weight_only.activations(case, operands)


def _verdict(name, scheme, dtype="bf16"):
    operands, x = _operands(scheme, dtype)
    prepared = PROVIDERS[name].prepare(operands)
    copies = tuple(tensor.clone() for tensor in prepared.tensors)
    return compare(prepared.call(x, copies), weight_only.expected(operands, x, prepared))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if not scheme.startswith("W3")])
def test_conch(modules, unpack_words, scheme):
    def mixed_precision_gemm(x, w_q_packed, w_s, w_zp, weight_size_bits, weight_bias, group_size):
        codes = unpack_words(w_q_packed.t(), weight_size_bits).t().to(w_s.dtype) - weight_bias
        spread = [tensor.repeat_interleave(group_size, 0) for tensor in ([w_s] if w_zp is None else [w_s, w_zp])]
        weight = (codes - (0 if w_zp is None else spread[1].to(w_s.dtype))) * spread[0]
        return linear(x, weight.t())

    modules("conch.ops.quantization.gemm", mixed_precision_gemm=mixed_precision_gemm)
    assert _verdict("conch", scheme).correct
    assert _verdict("conch", scheme, "fp16").correct


@pytest.mark.parametrize("scheme", SCHEMES)
def test_humming(modules, unpack_words, pack_words, scheme):
    seen = {}

    class HummingWeightSchema:
        def __init__(self, b_dtype, weight_scale_group_size, has_zero_point):
            self.bits, self.group, self.zero = (
                int(b_dtype.removeprefix("uint")),
                weight_scale_group_size,
                has_zero_point,
            )

    def transform(tensors, n, k, schema, torch_dtype, device):
        assert set(tensors) == {"weight", "weight_scale"} | ({"zero_point"} if schema.zero else set())
        assert tensors["weight"].shape == (n, k * schema.bits // 32)
        assert tensors["weight_scale"].shape == (n, k // (schema.group or k))
        return schema, tensors

    def get_heuristics_config(config, shape_m, device):
        seen[shape_m] = seen.get(shape_m, 0) + 1
        return {"block_shape": (8, 128, 64)}

    def humming_forward(config, x, weight, weight_scale, zero_point=None, locks=None, tuning_config=None):
        assert tuning_config == '{"block_shape": [8, 128, 64]}'
        assert locks.dtype == torch.int32
        assert not locks.any()
        codes = unpack_words(weight, config.bits).double()
        zero = 2.0 ** (config.bits - 1)
        group = codes.shape[1] // weight_scale.shape[1]
        if zero_point is not None:
            zero = unpack_words(zero_point.t(), config.bits).t().double().repeat_interleave(group, 1)
        return (x.double() @ ((codes - zero) * weight_scale.double().repeat_interleave(group, 1)).t()).to(x.dtype)

    modules("humming.schema", HummingWeightSchema=HummingWeightSchema)
    modules("humming.ops", pack_weight=pack_words)
    modules("humming.transform", prepare_and_transform_humming_tensors=transform)
    modules("humming.tune", get_heuristics_config=get_heuristics_config)
    modules("humming.forward", humming_forward=humming_forward)
    assert _verdict("humming", scheme).correct
    assert _verdict("humming", scheme, "fp16").correct
    assert seen == {3: 2}  # once per prepared weight


@pytest.mark.parametrize("name", ["mslk", "mslk-rowwise"])
@pytest.mark.parametrize("scheme", ["W4A16-g128", "W4A16-g64-sym"])
def test_mslk(modules, monkeypatch, name, scheme):
    def pack_int4(codes):
        assert codes.dtype == torch.int8
        assert int(codes.min()) >= -8
        return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)

    def matmul(x, packed, scale, zero):
        codes = torch.stack([packed << 4 >> 4, packed >> 4], -1).flatten(1).to(scale.dtype)
        group = codes.shape[1] // scale.shape[0]
        weight = codes * scale.t().repeat_interleave(group, 1) + zero.t().repeat_interleave(group, 1)
        return linear(x, weight)

    ops = types.SimpleNamespace(
        preshuffle_i4=lambda packed, scale: (packed.flip(0), scale.flip(1)),
        bf16i4bf16_shuffled=lambda x, packed, scale, zero: matmul(x, packed.flip(0), scale.flip(1), zero),
        bf16i4bf16_rowwise=matmul,
    )
    modules("mslk.quantize.shuffle", pack_int4=pack_int4)
    monkeypatch.setattr(torch.ops, "mslk", ops, raising=False)
    assert _verdict(name, scheme).correct


def test_bitsandbytes_dequantizes_high_nibbles_first():
    table = torch.arange(16.0)
    packed = torch.tensor([[0x12], [0x34], [0x56], [0x78]], dtype=torch.uint8)
    values = bitsandbytes.dequantize(packed, torch.tensor([1.0, 10.0]), table, 2, 4)
    assert values.tolist() == [[1, 2, 3, 4], [50, 60, 70, 80]]


def test_bitsandbytes_is_held_to_its_own_weight(modules):
    table = torch.linspace(-1, 1, 16)

    class QuantState:
        def __init__(self, absmax, shape, code, blocksize, quant_type, dtype):
            assert quant_type == "nf4"
            self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize

    def quantize_4bit(weight, blocksize, quant_type):
        blocks = weight.float().view(-1, blocksize)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).flatten().to(torch.uint8)
        packed = (codes[::2] << 4 | codes[1::2])[:, None]
        return packed, QuantState(absmax, weight.shape, table, blocksize, quant_type, weight.dtype)

    def matmul_4bit(x, packed, state):
        weight = bitsandbytes.dequantize(packed, state.absmax, state.code, *state.shape)
        return linear(x, weight.to(x.dtype))

    modules("bitsandbytes.functional", QuantState=QuantState, quantize_4bit=quantize_4bit)
    modules("bitsandbytes", matmul_4bit=matmul_4bit)
    assert _verdict("bitsandbytes", "W4A16-g64").correct


@pytest.mark.parametrize("scheme", ["W4A16-g128", "W4A16-g32-sym"])
def test_torch_int4_on_a_cpu(scheme):
    assert _verdict("torch-int4", scheme).correct


def test_torch_int4_pairs_and_offsets():
    operands, _ = _operands()
    pairs = torch_int4.pack_pairs(operands.codes)
    assert torch.equal(pairs >> 4, operands.codes[:, ::2])
    assert torch.equal(pairs & 15, operands.codes[:, 1::2])
    scale, zero = torch_int4.scale_and_zero(operands).unbind(-1)
    assert torch.equal(scale.t(), operands.scale)
    assert operands.zero_point is not None
    assert torch.allclose(zero.t().double(), (8 - operands.zero_point.double()) * operands.scale.double(), rtol=2**-8)


def test_torchao_pads_to_a_multiple_of_1024():
    padded = torchao.pad_k(_operands(shape=(128, 1152))[0])
    assert padded.codes.shape == (128, 2048)
    assert padded.scale.shape == (128, 16)
    assert padded.zero_point is not None
    assert padded.zero_point.shape == (128, 16)
    assert not padded.codes[:, 1152:].any()
    assert not padded.scale[:, 9:].any()
    same = torchao.pad_k(_operands(shape=(128, 1024))[0])
    assert same.codes.shape == (128, 1024)


@pytest.mark.parametrize(
    ("provider", "scheme", "dtype", "accepted"),
    [
        ("torch-int4", "W4A16-g32", "bf16", True),
        ("torch-int4", "W4A16-g128", "fp16", False),
        ("torch-int4", "W4A16", "bf16", False),
        ("torchao", "W8A16-g128", "bf16", False),
        ("mslk", "W2A16-g128", "bf16", False),
        ("conch", "W3A16-g128", "bf16", False),
        ("conch", "W4A16-g32", "bf16", False),
        ("conch", "W8A16", "fp16", True),
        ("bitsandbytes", "W4A16", "fp16", False),
        ("bitsandbytes", "W4A16-g64", "fp16", True),
        ("humming", "W3A16-g32", "fp16", True),
    ],
)
def test_what_peers_accept(provider, scheme, dtype, accepted):
    reason = PROVIDERS[provider].accepts(Case(weight_only.NAME, "", (128, 128), 1, scheme, dtype))
    assert (reason is None) is accepted
    assert accepted or scheme in reason


def test_shapes_that_peers_do_not_take(modules):
    modules("conch.ops.quantization.gemm", mixed_precision_gemm=None)
    operands, _ = _operands(shape=(96, 256))
    with pytest.raises(Unsupported, match="n and k multiples of 64 and 64, got n=96, k=256"):
        conch.prepare(operands)


def test_every_peer_names_its_package():
    peers = {name: provider for name, provider in PROVIDERS.items() if provider.peer}
    assert set(peers) == {"torch-int4", "humming", "torchao", "mslk", "mslk-rowwise", "conch", "bitsandbytes"}
    packages = {provider.distribution for provider in peers.values()} - {None}
    assert {package.partition("==")[0] for package in packages} == {
        "humming-kernels", "torchao", "mslk-cuda", "conch-triton-kernels", "bitsandbytes"
    }  # fmt: skip
    assert all("==" in package for package in packages)


@pytest.mark.parametrize(
    ("m", "variant", "rounded"), [(1, None, 0), (16, "warp_k", 0), (64, "rows", 0), (4096, None, 1), (1, "dense", 1)]
)
def test_ours_is_held_to_the_arithmetic_of_the_kernel_that_is_launched(m, variant, rounded):
    problem = choices.Problem(m, 4096, 4096, 4, 128, False, torch.bfloat16)
    chosen = ours.choice(problem, variant, choices.Device.typical(90))
    assert chosen == tiles.choose(problem, choices.Device.typical(90), variant)
    assert (chosen.variant == "dense") == bool(rounded)
    assert ours.arithmetic(chosen).weight_roundings == rounded
    assert ours.describe(chosen).startswith(f"{chosen.variant} {chosen.block_m} x" if chosen.num_warps else "dense: ")
    assert ours.describe(chosen).endswith(chosen.reason)


def test_what_ours_compiles_is_told_apart(monkeypatch):
    def choose(problem, variant):
        return choices.Choice(variant or "warp_k", 8 if problem.m <= 8 else 16, reason=f"for {problem.m}")

    def key(m, variant=None, shape=(4096, 4096), scheme="W4A16-g128", dtype="bf16"):
        return ours.compilation(Case(weight_only.NAME, "", shape, m, scheme, dtype), variant)

    monkeypatch.setattr(ours, "choice", choose)
    assert key(2) == key(4) == key(8) == key(8, "warp_k")
    assert key(16) == key(32)
    different = [key(1), key(2), key(12), key(16), key(2, "rows"), key(2, shape=(8192, 4096)), key(2, dtype="fp16")]
    assert len({*different, key(2, scheme="W4A16-g64")}) == 8


def test_ours_packs_once_for_all_variants():
    operands, _ = _operands()
    first, second = ours.prepare(operands), ours.prepare(operands)
    assert [tensor.data_ptr() for tensor in first.tensors] == [tensor.data_ptr() for tensor in second.tensors]


def test_ours_lets_go_of_the_counters_of_captured_launches(monkeypatch):
    reserved = types.SimpleNamespace(captured_taken=100, stock={4: []})
    monkeypatch.setattr(workspace, "_reserves", {0: reserved})
    for provider in PROVIDERS.values():
        provider.release()
    assert reserved == types.SimpleNamespace(captured_taken=0, stock={})
