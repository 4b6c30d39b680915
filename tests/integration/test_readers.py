"""transformers with compressed-tensors reads what sliderquant writes: the same logits, over the grid of schemes."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sliderquant.checkpoint import CheckpointWriter, read_checkpoint
from sliderquant.loading import load
from sliderquant.modules import QuantizedLinear
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme

IDS = (torch.arange(2 * 9).view(2, 9) * 11) % 61

# Asymmetric models only load densely there. Run in a process of its own: the readers change modules in place.
READER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
results = {}
for name, (path, dense) in job["models"].items():
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense else {}
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    with torch.no_grad():
        results[f"{name}/logits"] = model(torch.tensor(job["ids"])).logits.clone()
    weight = model.model.layers[0].mlp.down_proj.weight
    results[f"{name}/weight"] = weight.detach().clone()
    assert model.config.sliderquant["format_version"] == 1
save_file(results, job["results"])
"""


@dataclass(frozen=True)
class Case:
    scheme: str
    kind: str = "even"
    down_proj: str | None = None

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.scheme, self.down_proj, self.kind) if part)

    @property
    def symmetric(self) -> bool:
        return Scheme.parse(self.scheme).symmetric


GRID = [
    Case(f"W{bits}A16{grouping}{symmetry}", "tied" if (bits, grouping) in ((4, "-g64"), (2, "")) else "even")
    for bits in (2, 3, 4, 8)
    for grouping in ("", "-g32", "-g64", "-g128")
    for symmetry in ("-sym", "-asym")
]
# Rows and columns that do not fill 32-bit words.
GRID += [Case(f"W{bits}A16-{symmetry}", "odd") for bits in (2, 3, 4, 8) for symmetry in ("sym", "asym")]
GRID += [Case("W4A16-g64-sym", "biases"), Case("W3A16-g64-asym", "biases")]
GRID += [
    Case("W3A16-g64-sym", down_proj="W3A16-sym"),
    Case("W4A16-g128", "bf16"),
    Case("W4A16-g128-sym", "bf16"),
    Case("W8A8-sym-act-sym", "bf16"),
]


def build(kind: str) -> LlamaForCausalLM:
    odd = kind == "odd"
    config = LlamaConfig(
        hidden_size=92 if odd else 128,
        intermediate_size=149 if odd else 256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=18 if odd else 32,
        vocab_size=61 if odd else 64,
        tie_word_embeddings=kind == "tied",
        attention_bias=kind == "biases",
        mlp_bias=kind == "biases",
        dtype="bfloat16" if kind == "bf16" else "float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(config.dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
        elif "embed" not in name:
            parameter.mul_(5)
    return model


def write(out: Path, case: Case, original: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the stored weights, in fp32."""
    source = out.parent / "source"
    source.mkdir(exist_ok=True)
    stored = copy.deepcopy(original).float()
    with CheckpointWriter(out) as writer:
        for key, weight in original.state_dict().items():
            if key.endswith("proj.weight"):
                name = key.removesuffix(".weight")
                scheme = Scheme.parse(case.down_proj if case.down_proj and "down_proj" in key else case.scheme)
                quantized = round_to_nearest(weight.float(), scheme, weight.dtype)
                trained = dequantize(quantized, scheme)
                writer.add_quantized(name, quantized, scheme, trained)
                stored.get_parameter(key).copy_(trained)
            elif not (original.config.tie_word_embeddings and key == "lm_head.weight"):
                writer.add_tensor(key, weight)
        writer.finish(original.config, source)
    return stored


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: with more threads, most of the time goes into waking them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LlamaForCausalLM]]:
    folder = tmp_path_factory.mktemp("readers")
    models = {kind: build(kind) for kind in {case.kind for case in GRID}}
    return {case.name: (folder / case.name, write(folder / case.name, case, models[case.kind])) for case in GRID}


@pytest.fixture(scope="module")
def read_by_transformers(
    written: dict[str, tuple[Path, LlamaForCausalLM]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("results")
    job = {
        "models": {case.name: (str(written[case.name][0]), not case.symmetric) for case in GRID},
        "ids": IDS.tolist(),
        "results": str(folder / "results.safetensors"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run([sys.executable, "-c", READER, str(folder / "job.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(job["results"])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", [case for case in GRID if case.kind != "bf16"], ids=lambda case: case.name)
@torch.no_grad()
def test_same_logits(
    case: Case,
    written: dict[str, tuple[Path, LlamaForCausalLM]],
    read_by_transformers: dict[str, torch.Tensor],
) -> None:
    path, stored = written[case.name]
    model = load(path, device="cpu", dtype="float32")
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sum(name.endswith("_proj") for name in linears) == 14
    logits = model(IDS).logits
    assert relative(logits, read_by_transformers[f"{case.name}/logits"]) < 1e-4
    assert relative(logits, stored(IDS).logits) < 1e-4


@pytest.mark.parametrize("case", [case for case in GRID if case.kind == "bf16"], ids=lambda case: case.name)
def test_same_weights_in_bf16(
    case: Case,
    written: dict[str, tuple[Path, LlamaForCausalLM]],
    read_by_transformers: dict[str, torch.Tensor],
) -> None:
    """There, the dense weight is rounded to bf16; so is ours when it is asked for in bf16."""
    path, stored = written[case.name]
    linear = load(path, device="cpu").model.layers[0].mlp.down_proj
    theirs = read_by_transformers[f"{case.name}/weight"]
    assert theirs.dtype == linear.dtype == torch.bfloat16
    assert torch.equal(linear.dequantize(), theirs)
    assert torch.equal(linear.dequantize(torch.float32), stored.model.layers[0].mlp.down_proj.weight)


def test_the_odd_sizes_do_not_fill_words(written: dict[str, tuple[Path, LlamaForCausalLM]]) -> None:
    for case in GRID:
        if case.kind == "odd":
            bits = Scheme.parse(case.scheme).bits
            shapes = read_checkpoint(written[case.name][0]).linear_shapes.values()
            assert any(inputs * bits % 32 for _, inputs in shapes)
            assert any(out * bits % 32 for out, _ in shapes)
