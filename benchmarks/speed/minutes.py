"""How long quantizing takes on known GPUs, by count of operations: nothing is run, no GPU is needed.

The counts are those of `sliderquant quantize --dry-run` (`sliderquant.planning.duration`), which divides them by what
it measures of the machine; here they are divided by shares of the peaks on the data sheets.
"""

import argparse
from pathlib import Path

from benchmarks import results
from benchmarks.random_model import SHAPES, config_of
from sliderquant.models import family_of
from sliderquant.models.files import StoredTensor
from sliderquant.models.matching import empty_model
from sliderquant.models.source import ModelSource
from sliderquant.planning.duration import Speed, expected_seconds
from sliderquant.planning.methods import METHODS, with_overrides
from sliderquant.planning.plan import Plan, make_plan
from sliderquant.planning.request import Request
from sliderquant.schemes import ModelScheme

__all__ = ["GPUS", "minutes", "plan_of"]

# TFLOP/s of dense bf16 products with fp32 sums, of fp32 products, and GB/s, from the data sheets.
GPUS: dict[str, tuple[float, float, float]] = {
    "RTX 3060": (25.6, 12.7, 360.0),
    "RTX 4090": (165.2, 82.6, 1008.0),
    "A100 80GB": (312.0, 19.5, 2039.0),
    "H100 SXM": (989.0, 67.0, 3350.0),
}
PRODUCTS, BANDWIDTH = 0.4, 0.7  # shares of the peaks
BYTES_OF_UPDATE = 7 * 4  # AdamW reads a parameter, its gradient and two moments, and writes three of them
CALLS = 1e5  # in a second, from Python
SCHEME = "W4A16-g128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.2-1b", "llama-3-8b"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="folder for the result file")


def run(arguments: argparse.Namespace) -> None:
    rows = []
    for shape in arguments.shapes:
        for effort in METHODS["sliderquant"].efforts:
            plan = plan_of(shape, effort, arguments.samples, arguments.seqlen)
            found = {gpu: f"{minutes(plan, gpu):.1f}" for gpu in GPUS}
            memory = f"{plan.memory_bytes / 1e9:.1f}"
            rows.append({"model": shape, "effort": effort, **found, "GB on the GPU": memory})
    print(f"Minutes of refining, {arguments.samples} samples of {arguments.seqlen} tokens, {SCHEME}\n")
    print(results.markdown(rows, list(rows[0])))
    print(f"\nwritten to {results.write('minutes', rows, arguments.out)}")


def plan_of(shape: str, effort: str, samples: int, seqlen: int) -> Plan:
    """The plan of a model that has a configuration and no files."""
    config = config_of(shape)
    model = empty_model(shape, config)
    model.tie_weights()
    tensors = {
        name: StoredTensor(Path(shape), name, "BF16", tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    source = ModelSource(shape, Path(shape), config, family_of(shape, config.model_type, None), tensors)
    method, scheme = METHODS["sliderquant"], ModelScheme.parse(SCHEME)
    settings = with_overrides(method, scheme, {}, effort)
    return make_plan(source, Request(shape, scheme, method, settings, effort, samples=samples, seqlen=seqlen))


def minutes(plan: Plan, gpu: str) -> float:
    """Minutes of refining on one of GPUS."""
    bf16, fp32, bandwidth = GPUS[gpu]
    speed = Speed(bf16 * 1e12 * PRODUCTS, fp32 * 1e12 * PRODUCTS, bandwidth * 1e9 * BANDWIDTH / BYTES_OF_UPDATE, CALLS)
    return expected_seconds(plan, speed) / 60
