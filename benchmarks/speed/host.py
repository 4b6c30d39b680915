"""Microseconds that a call costs on the host, before the GPU has anything to do.

Shapes are small: a GPU is done with each call long before the next one comes. Every op is called directly, as a model
calls it, and through torch's dispatcher, as torch.compile and profilers see it; F.linear stands beside them. All take
turns in one run, and the figure is the median over the rounds. On a machine without a GPU the launch is left out
(`host_stub`): what is measured is Python alone, and F.linear is that of the CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import results
from sliderquant.modules.linear import PackedLinear
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.schemes import Scheme
from sliderquant_kernels import (
    factor_hadamard,
    hadamard,
    hadamard_quantize,
    low_bit_linear,
    quantize_activations,
    weight_only_linear,
)
from sliderquant_kernels.common import devices

SIZE = 256
TOKENS = 1
COLUMNS = ["call", "route", "us", "quartiles"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=41, help="times that all calls take turns")
    parser.add_argument("--calls", type=int, default=200, help="calls of one turn, timed together")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    launched = torch.cuda.is_available()
    if launched:
        rows = measure(torch.device("cuda"), arguments.rounds, arguments.calls)
    else:
        from benchmarks.speed.host_stub import stubbed_gpu

        with stubbed_gpu():
            rows = measure(torch.device("cpu"), arguments.rounds, arguments.calls)
    shared = {"launch": "real" if launched else "left out", "size": SIZE, "tokens": TOKENS}
    path = results.write("host", [shared | row for row in rows], arguments.out)
    print(results.markdown(rows, COLUMNS))
    print(f"launches: {shared['launch']}; written to {path}")


def measure(device: torch.device, rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row for each call and route: the median microseconds and the quartiles over the rounds."""
    routes = cases(device)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in routes}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, (call, around) in routes.items():
                with around:
                    spent = microseconds(call, calls, device)
                if turn > 0:  # the first one compiles
                    times[name].append(spent)
    return [
        {
            "call": call,
            "route": route,
            "us": statistics.median(values),
            "quartiles": [round(value, 2) for value in statistics.quantiles(values, n=4)]
            if len(values) > 1
            else values,
        }
        for (call, route), values in times.items()
    ]


def microseconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Per call; a GPU is idle at the start, and what it still has to do at the end does not count."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - start) / calls


def cases(device: torch.device) -> dict[tuple[str, str], tuple[Callable[[], Any], Any]]:
    """What is timed by call and route, and the context that it runs in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, SIZE, generator=generator).to(device, torch.bfloat16)
    linear = random_linear("W4A16-g128", device, generator)
    rounded = random_linear("W4A4", device, generator)
    packed, low_bit, activations = linear.packed, rounded.packed, quantize_activations(x, 4)
    transform = factor_hadamard(SIZE)
    dense = torch.randn(SIZE, SIZE, generator=generator).to(device, torch.bfloat16)
    ours: dict[str, Callable[[], Any]] = {
        "weight_only_linear": lambda: weight_only_linear(x, packed, linear.layout),
        "low_bit_linear": lambda: low_bit_linear(activations, low_bit, rounded.layout, x.dtype),
        "quantize_activations": lambda: quantize_activations(x, 4),
        "hadamard": lambda: hadamard(x, transform),
        "hadamard_quantize": lambda: hadamard_quantize(x, transform, 4),
        "PackedLinear W4A16": lambda: linear(x),
        "PackedLinear W4A4": lambda: rounded(x),
    }
    found: dict[tuple[str, str], tuple[Callable[[], Any], Any]] = {}
    for name, call in ours.items():
        found[name, "direct"] = call, nullcontext()
        found[name, "dispatcher"] = call, through_dispatcher()
    found["F.linear", "torch"] = (lambda: F.linear(x, dense)), nullcontext()
    return found


def random_linear(scheme_name: str, device: torch.device, generator: torch.Generator) -> PackedLinear:
    scheme = Scheme.parse(scheme_name)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, scheme.levels + 1, shape, generator=generator, dtype=torch.uint8).to(device)

    groups = scheme.groups(SIZE)
    scale = (0.01 + 0.02 * torch.rand(SIZE, groups, generator=generator)).to(device, torch.bfloat16)
    zero_point = None if scheme.symmetric else codes(SIZE, groups)
    return PackedLinear(QuantizedWeight(codes(SIZE, SIZE), scale, zero_point), scheme)


class through_dispatcher:
    """Ops go through torch's dispatcher within this context, as if something watched them, but nothing does."""

    def __enter__(self) -> None:
        self._kept = devices.nothing_watches
        devices.nothing_watches = lambda: False

    def __exit__(self, *_: Any) -> None:
        devices.nothing_watches = self._kept
