"""Memory that launches share: the counters by which the programs of a split tile find out which of them is the last.

A counter is 0 before and after every launch, because the last program puts it back. Launches that may run at the same
time must not share counters: each stream has its own, and each launch that is captured into a CUDA graph keeps its own
for as long as the process lives, since the graph may be replayed on any stream.

What lives as long as the process must not come out of the memory pool of a CUDA graph: `torch.compile` with
`mode="reduce-overhead"` already runs a model inside such a pool before it captures, and refuses a pool that holds
memory which is none of the model's results. `outside_pools` allocates elsewhere, wherever it is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import devices

_POOL = 1 << 20  # counters for captured launches, 4 MB: a graph of a 32-layer model takes some 10,000
_EAGER = 1 << 18  # counters for streams, 1 MB
_SLICE = 4096  # counters of one stream, or what a launch needs if that is more
_AT_ONCE = 32  # slices that are cut for captured launches
_lock = threading.Lock()
_by_stream: dict[tuple[int, int], tuple[Tensor, int]] = {}
_reserves: dict[int, _Reserve] = {}


class _Reserve:
    """The counters of a device, and how many of them are handed out."""

    def __init__(self, device: torch.device) -> None:
        self.captured = outside_pools(lambda: torch.zeros(_POOL, dtype=torch.int32, device=device), device)
        self.eager = outside_pools(lambda: torch.zeros(_EAGER, dtype=torch.int32, device=device), device)
        self.captured_taken = self.eager_taken = 0
        # Slices for captured launches by their size, that nobody has yet.
        self.stock: dict[int, list[Tensor]] = {}


class _Outcome(NamedTuple):
    tensor: Tensor | None
    error: BaseException | None


def split_counters(count: int, device: torch.device) -> Tensor:
    """At least `count` zeros int32 on `device`, for one launch on the current stream of the device."""
    index = device.index
    if index is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if index != devices.current_device():
        with torch.cuda.device(index):
            return split_counters(count, device)
    if devices.is_capturing():
        return _captured(count, device)
    found = _by_stream.get((index, devices.raw_stream(index)))
    if found is not None and found[1] >= count:
        return found[0]
    return _of_stream(count, device)


def reserve(device: torch.device) -> None:
    """Allocate a CUDA device's counters now, so that a launch does not have to. Nothing during a capture."""
    with _lock:
        if device.type == "cuda" and not devices.is_capturing():
            _reserve(torch.device("cuda", devices.current_device()) if device.index is None else device)


def release_captured() -> None:
    """Hand the counters of all captured launches out again, for a process that captures graphs without end.

    Safe when no graph captured before runs at the same time as one captured after this call.
    """
    with _lock:
        for reserved in _reserves.values():
            reserved.captured_taken = 0
            reserved.stock.clear()


def outside_pools(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` returns, allocated where no memory pool that is active here gets hold of it, and written to.

    Not during a capture of the current stream. torch binds a pool to a thread, or to a stream: a new thread, whose
    current stream is the default one, is bound to none.
    """
    if device.type != "cuda":
        return make()
    outcomes: list[_Outcome] = []

    def run() -> None:
        try:
            with torch.cuda.device(device):
                tensor = make()
                # Other streams will read it.
                torch.cuda.current_stream(device).synchronize()
            outcomes.append(_Outcome(tensor, None))
        except BaseException as error:  # raised where it was asked for
            outcomes.append(_Outcome(None, error))

    thread = threading.Thread(target=run, name="sliderquant-allocate")
    thread.start()
    thread.join()
    tensor, error = outcomes[0]
    if error is not None:
        raise error
    assert tensor is not None
    return tensor


def _reserve(device: torch.device) -> _Reserve:
    reserved = _reserves.get(device.index)
    if reserved is None:
        reserved = _reserves[device.index] = _Reserve(device)
    return reserved


def _of_stream(count: int, device: torch.device) -> Tensor:
    with _lock:
        reserved, size = _reserve(device), max(count, _SLICE)
        first = reserved.eager_taken
        if first + size <= reserved.eager.numel():
            reserved.eager_taken = first + size
            counters = reserved.eager.narrow(0, first, size)
        else:
            counters = outside_pools(lambda: torch.zeros(size, dtype=torch.int32, device=device), device)
        _by_stream[device.index, devices.raw_stream(device.index)] = counters, size
        return counters


def _captured(count: int, device: torch.device) -> Tensor:
    # Aligned to 16 bytes, like what torch allocates: the kernels are compiled for that.
    size = -(-count // 4) * 4
    with _lock:
        reserved = _reserves.get(device.index)
        if reserved is not None:
            stock = reserved.stock.get(size)
            if not stock:
                # Many at once: torch takes as long for one slice as for several.
                first = reserved.captured_taken
                number = min((reserved.captured.numel() - first) // size, _AT_ONCE)
                reserved.captured_taken = first + number * size
                block = reserved.captured.narrow(0, first, number * size)
                stock = reserved.stock[size] = list(block.split(size)) if number else []
            if stock:
                return stock.pop()
    # No weight was packed before the capture, or more graphs than foreseen: the graph itself sets them to zero.
    return torch.zeros(count, dtype=torch.int32, device=device)
