"""What the machine can do at best, measured in the same run: copy bandwidth and 16-bit matmul rate, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .timing import Cuda, Device, Settings, in_graphs, in_turns, quantiles

__all__ = ["Floors", "measure"]

SETTINGS = Settings(graph_us=5000.0, budget_us=200_000.0)


@dataclass(frozen=True)
class Floors:
    """copy_gbps: bytes read plus written, GB/s. matmul_tflops: square, bf16. empty_kernel_us: a kernel of one element
    inside a graph, the least that a row on CUDA can show; 0 on a CPU."""

    copy_gbps: float
    matmul_tflops: float
    empty_kernel_us: float

    def floor_us(self, work_bytes: float, flops: float) -> float:
        """The least time for moving the bytes and doing the operations, whichever takes longer."""
        return max(work_bytes / self.copy_gbps / 1e3, flops / self.matmul_tflops / 1e6)

    def better(self, other: Floors) -> Floors:
        """The better of both for each: what another program's work was in says nothing about the machine."""
        return Floors(
            max(self.copy_gbps, other.copy_gbps),
            max(self.matmul_tflops, other.matmul_tflops),
            min(self.empty_kernel_us, other.empty_kernel_us),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def measure(device: torch.device, timer: Device | None = None) -> Floors:
    """Measure them now. Takes about a second."""
    cuda = device.type == "cuda"
    timer = timer or Cuda()
    generator = torch.Generator(device).manual_seed(0)
    # Large against the cache, small against memory.
    size = 1 << (30 if cuda else 27)
    source, target = (
        torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator) for _ in range(2)
    )
    copy = _median_us(partial(target.copy_, source), 100.0, timer, cuda)
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device, generator=generator).bfloat16() for _ in range(2))
    matmul = _median_us(partial(torch.mm, left, right), 1000.0, timer, cuda)
    empty = 0.0
    if cuda:
        one = torch.zeros(1, device=device)
        empty = _median_us(lambda: one.add_(1), 1.0, timer, cuda)
    return Floors(2 * size / copy / 1e3, 2 * side**3 / matmul / 1e6, empty)


def _median_us(call: Callable[[], Any], floor_us: float, timer: Device, cuda: bool) -> float:
    call()
    timing = in_graphs([call], floor_us, timer, SETTINGS) if cuda else in_turns([call], None, SETTINGS)
    return quantiles(timing.samples)[1]
