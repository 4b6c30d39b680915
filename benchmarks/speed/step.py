"""What the quantizers cost while learning: a training step of a window against the same layers without quantizers.

Both are forward, loss and backward of a window of two decoder layers, in turns in one run, on the same batch. Without
quantizers gradients go to the weights of the linears; with them to what is learned. The figure is the median of the
ratios of neighbouring steps. Optimizer steps are in neither.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import results
from sliderquant.calibration.layerwise import LayerwiseModel
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import ModelSource, open_model
from sliderquant.planning.methods import METHODS
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.planning.settings import Settings
from sliderquant.refine.layer import refined_layer
from sliderquant.refine.window import WindowLayers, matmul_context
from sliderquant.schemes import ModelScheme

DEMO = Path(__file__).parents[2] / "sliderquant" / "assets" / "demo-llama-5m"
WIDTHS: dict[str, dict[str, int]] = {
    "1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4},
    "4096": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
MATMULS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEMES = ("W2A16", "W4A4KV4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", nargs="+", choices=["demo", *WIDTHS], default=["demo", "1024"])
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--matmul", nargs="+", choices=MATMULS, default=list(MATMULS))
    parser.add_argument("--compile", choices=["always", "never"], default="always", help="the quantizers, on a CPU")
    parser.add_argument("--batch", type=int, default=3, help="samples of a batch")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for window in arguments.windows:
            source = open_model(DEMO if window == "demo" else random_model(Path(folder) / window, WIDTHS[window]))
            for scheme in arguments.schemes:
                for matmul in arguments.matmul:
                    row = measure(
                        source, ModelScheme.parse(scheme), MATMULS[matmul], arguments.compile, arguments.batch,
                        arguments.seqlen, arguments.rounds, torch.device(arguments.device),
                    )  # fmt: skip
                    compiled = arguments.compile == "always"
                    rows.append({"window": window, "scheme": scheme, "matmul": matmul, "compiled": compiled, **row})
                    print(results.markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    path = results.write("step", rows, arguments.out)
    print(results.markdown(rows, COLUMNS))
    print(f"written to {path}")


COLUMNS = ["window", "scheme", "matmul", "compiled", "ratio", "quartiles", "plain_ms", "quantized_ms"]


def random_model(folder: Path, sizes: dict[str, int]) -> Path:
    """A Llama of two layers with random weights in bf16."""
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256, max_position_embeddings=4096)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure(
    source: ModelSource,
    scheme: ModelScheme,
    matmul: torch.dtype,
    compile_: str,
    batch: int,
    seqlen: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Ratio of the two steps, its quartiles over the rounds, and the median milliseconds of each."""
    settings = Settings.model_validate({"compile": compile_})
    request = Request(source.name, scheme, METHODS["sliderquant-published"], settings, samples=batch, seqlen=seqlen)
    plan = make_plan(source, request)
    ids = torch.randint(0, source.config.vocab_size, (batch, seqlen), generator=torch.Generator().manual_seed(0))
    model = LayerwiseModel(Decoder(source, device), ids, plan.rotations, plan.scheme.kv_bits)
    hidden = model.stream(memory_limit=1e12).data.to(device)
    generator = torch.Generator().manual_seed(1)
    target = hidden + 0.1 * torch.randn(hidden.shape, generator=generator).to(device)
    refined = [refined_layer(plan, model, index, seed=0) for index in (0, 1)]
    plain = [model.layer(index, rounded=False) for index in (0, 1)]
    for layer in plain:
        for name in layer.spec.linears:
            layer.linear(name).weight.requires_grad_()  # type: ignore[operator]
    steps = {
        "plain": stepper(WindowLayers(plain), hidden, target, matmul),
        "quantized": stepper(WindowLayers(refined), hidden, target, matmul),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # warm
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [quantized / dense for dense, quantized in zip(times["plain"], times["quantized"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)],
        "plain_ms": statistics.median(times["plain"]),
        "quantized_ms": statistics.median(times["quantized"]),
        "tokens": batch * seqlen,
        "rounds": rounds,
    }


def stepper(window: WindowLayers, hidden: Tensor, target: Tensor, matmul: torch.dtype) -> Callable[[], None]:
    """One forward, loss and backward; gradients are dropped first, as an optimizer would."""
    parameters = [p for layer in window.layers for p in layer.module.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with matmul_context(matmul, hidden.device):
            out = window(hidden)
        F.mse_loss(out.float(), target).backward()

    return step
