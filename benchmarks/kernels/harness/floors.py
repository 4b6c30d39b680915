"""What the machine can do at best, measured in the same run on random data: bytes moved, and 16-bit matmul rate.

Kernels move the bytes, as those do that are compared with them. `Tensor.copy_` is a memcpy, and what a driver makes of
one is its own affair: on an H200 memcpys of 1 GiB moved 2.8 TB/s, those of up to 0.5 GB 4.2, and cuBLAS read 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from sliderquant_kernels.tools.timing import Cuda, Device, Settings, in_graphs, in_turns, quantiles

__all__ = ["Floors", "measure"]

SETTINGS = Settings(graph_us=5000.0, budget_us=200_000.0)
# Buffers that are read in turns, and bytes of each: together they are large against any cache, each about as large as
# what a model's kernels read.
BUFFERS, BUFFER_BYTES = 4, {"cuda": 1 << 28, "cpu": 1 << 26}
# So many values the reading kernel reduces to one: rows are long, and there are many of them.
ROW = 1 << 14


@dataclass(frozen=True)
class Floors:
    """
    Attributes:
        copy_gbps: of an elementwise kernel, bytes read plus written, GB/s; a memcpy in files without `read_gbps`.
        matmul_tflops: square, bf16.
        empty_kernel_us: a kernel of one element inside a graph, the least that a row on CUDA can show; 0 on a CPU.
        read_gbps: of a reduction, which writes next to nothing; 0 in files that are older than this field.
    """

    copy_gbps: float
    matmul_tflops: float
    empty_kernel_us: float
    read_gbps: float = 0.0

    @property
    def bandwidth_gbps(self) -> float:
        """The better of copying and reading: the roof of every kernel that moves bytes."""
        return max(self.copy_gbps, self.read_gbps)

    def floor_us(self, work_bytes: float, flops: float) -> float:
        """The least time for moving the bytes and doing the operations, whichever takes longer."""
        return max(work_bytes / self.bandwidth_gbps / 1e3, flops / self.matmul_tflops / 1e6)

    def better(self, other: Floors) -> Floors:
        """The better of both for each: what another program's work was in says nothing about the machine."""
        return Floors(
            max(self.copy_gbps, other.copy_gbps),
            max(self.matmul_tflops, other.matmul_tflops),
            min(self.empty_kernel_us, other.empty_kernel_us),
            max(self.read_gbps, other.read_gbps),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def measure(
    device: torch.device, timer: Device | None = None, settings: Settings = SETTINGS, size: int | None = None
) -> Floors:
    """Measure them now. Takes about a second on a GPU.

    Args:
        size: bytes of each buffer; None: what no cache holds.
    """
    cuda = device.type == "cuda"
    timer = timer or Cuda()
    generator = torch.Generator(device).manual_seed(0)
    size = size or BUFFER_BYTES[device.type]
    sources = [_random_words(size, device, generator) for _ in range(BUFFERS)]
    copies = [partial(torch.bitwise_not, source, out=torch.empty_like(source)) for source in sources]
    copy = _median_us(copies, 100.0, timer, cuda, settings)
    largest = torch.empty(size // 4 // ROW, dtype=torch.int32, device=device)
    reads = [partial(torch.amax, source.view(-1, ROW), 1, out=largest) for source in sources]
    read = _median_us(reads, 50.0, timer, cuda, settings)
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device, generator=generator).bfloat16() for _ in range(2))
    matmul = _median_us([partial(torch.mm, left, right)], 1000.0, timer, cuda, settings)
    empty = 0.0
    if cuda:
        one = torch.zeros(1, device=device)
        empty = _median_us([lambda: one.add_(1)], 1.0, timer, cuda, settings)
    return Floors(2 * size / copy / 1e3, 2 * side**3 / matmul / 1e6, empty, size / read / 1e3)


def _random_words(size: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """int32 of random bits: equal values would cost a GPU less power, and so make it faster."""
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator)
    return values.view(torch.int32)


def _median_us(
    calls: Sequence[Callable[[], Any]], floor_us: float, timer: Device, cuda: bool, settings: Settings
) -> float:
    for call in calls:
        call()
    timing = in_graphs(calls, floor_us, timer, settings) if cuda else in_turns(calls, None, settings)
    return quantiles(timing.samples)[1]
