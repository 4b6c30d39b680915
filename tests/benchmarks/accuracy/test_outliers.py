"""Injected outliers leave a model as it is, ruin it at 4-bit activations, and a rotation undoes that.

The model that quantizes is simulated: weights rounded to nearest per channel, the inputs of the same linears by the
op that the low-bit kernels use, per token and asymmetric, computed in fp32.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.outliers import inject_outliers
from sliderquant.models.source import ModelSource, open_model
from sliderquant.modules.rotated import insert_rotations
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.rotations.folded import RotatedSource
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import Scheme
from sliderquant_kernels import quantize_activations

CPU = torch.device("cpu")


def model_of(source: ModelSource, scheme: Scheme | None = None):
    """The model of a source in fp32; with a scheme, its linears' weights rounded to nearest."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval().requires_grad_(False)
    weights = {name: source.weight(name, CPU) for name in source.files}
    if scheme is not None:
        for name in source.linear_names:
            rounded = round_to_nearest(weights[f"{name}.weight"], scheme, torch.float32)
            weights[f"{name}.weight"] = dequantize(rounded, scheme)
    model.load_state_dict(weights, strict=False)
    return model


@contextmanager
def activations_of(model, source: ModelSource, bits: int):
    """The inputs of the linears that are quantized go through the per-token quantizer."""

    def quantized(_, arguments):
        return (quantize_activations(arguments[0], bits, symmetric=False).dequantize(),)

    hooks = [model.get_submodule(name).register_forward_pre_hook(quantized) for name in source.linear_names]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def perplexity(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def w4a4(source: ModelSource, ids, rotations: Rotations | None = None):
    """Perplexity of a model rounded to nearest, 4-bit weights per channel and 4-bit activations per token."""
    seen = source if rotations is None else RotatedSource.of(source, rotations)
    model = model_of(seen, Scheme(4))
    with activations_of(model, source, 4):
        if rotations is not None:
            insert_rotations(model, source.family, rotations)
        return perplexity(model, ids)


@pytest.fixture(scope="module")
def demo(demo_model):
    return open_model(demo_model)


@pytest.fixture(scope="module")
def ids(demo):
    """Text that the model itself has written: nobody's else is at hand everywhere. int64 `[4, 160]`."""
    torch.manual_seed(0)
    start = torch.zeros(4, 1, dtype=torch.long)
    return model_of(demo).generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=159, max_new_tokens=159
    )


@pytest.fixture(scope="module")
def with_outliers(demo, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32)
    inject_outliers(model, demo.family, channels=4, factor=32)
    folder = tmp_path_factory.mktemp("outliers")
    model.save_pretrained(folder)
    return open_model(folder)


def test_the_model_computes_what_it_did(demo, with_outliers, ids):
    plain, changed = model_of(demo), model_of(with_outliers)
    with torch.no_grad():
        assert torch.equal(changed(ids).logits, plain(ids).logits)
    assert not with_outliers.config.tie_word_embeddings
    for model, outliers in ((plain, 0), (changed, 4)):
        norm = model.model.layers[5].input_layernorm.weight
        assert (norm.abs() > 10 * norm.abs().median()).sum() == outliers


def test_channels_are_those_of_the_seed(demo):
    def outlying(seed):
        model = AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32)
        inject_outliers(model, demo.family, channels=3, factor=50, seed=seed)
        return [
            model.get_submodule(name).weight.topk(3).indices.tolist()
            for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
        ]

    assert outlying(1) == outlying(1) != outlying(2)
    assert len({tuple(chosen) for chosen in outlying(1)}) == 3


def test_rotation_rescues_four_bit_activations(demo, with_outliers, ids):
    original = perplexity(model_of(demo), ids)
    found = {
        "no outliers": w4a4(demo, ids),
        "outliers": w4a4(with_outliers, ids),
        "norms folded": w4a4(with_outliers, ids, Rotations.of_model(with_outliers, [])),
        "R1, R2, R4": w4a4(with_outliers, ids, Rotations.of_model(with_outliers, ["R1", "R2", "R4"])),
    }
    print(f"16 bits: {original:.2f};", "; ".join(f"{name}: {value:.2f}" for name, value in found.items()))
    assert found["outliers"] > 20 * original
    assert found["R1, R2, R4"] < 1.25 * original
    # Better than what has no outliers beyond the model's own.
    assert found["R1, R2, R4"] < min(found["no outliers"], found["norms folded"])
