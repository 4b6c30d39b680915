"""Layer shapes, against the dimensions that the models publish."""

import pytest

from benchmarks.kernels.harness import shapes
from benchmarks.kernels.harness.shapes import Layer


def _shapes(name, **options):
    return {layer.name.split()[-1]: (layer.n, layer.k) for layer in shapes.layers(name, **options)}


def test_layers_of_llama_3_8b():
    assert _shapes("llama-3-8b") == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "q": (4096, 4096),
        "k": (1024, 4096),
        "gate": (14336, 4096),
    }


def test_one_of_eight_shards_of_llama_3_70b():
    assert _shapes("llama-3-70b", single=False, shard=True) == {
        "qkv": (1280, 8192),
        "o": (8192, 1024),
        "gate_up": (7168, 8192),
        "down": (8192, 3584),
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Weights of the layers alone, in millions: hidden * (qkv + o) + 3 * hidden * intermediate.
    [
        ("llama-2-7b", 202.4),
        ("llama-2-13b", 317.2),
        ("llama-3-8b", 218.1),
        ("llama-3-70b", 855.6),
        ("qwen2.5-7b", 233.0),
        ("qwen2.5-14b", 275.3),
    ],
)
def test_weights_per_layer(name, parameters):
    merged = shapes.layers(name, single=False)
    assert sum(layer.n * layer.k for layer in merged) / 1e6 == pytest.approx(parameters, abs=0.06)


def test_every_layer_fits_groups_of_128_and_all_models_are_there():
    every = shapes.every_layer()
    assert all(layer.k % 128 == 0 for layer in every)
    assert {layer.name.split()[0] for layer in every} == {*shapes.MODELS, "llama-3-8b/8", "llama-3-70b/8"}


def test_unique_joins_names_of_equal_shapes():
    found = shapes.unique([Layer("a", 8, 4), Layer("b", 4, 8), Layer("c", 8, 4), Layer("a", 8, 4)])
    assert found == [Layer("a, c", 8, 4), Layer("b", 4, 8)]
