"""Memory that launches share: the counters by which the programs of a split tile find out which of them is the last.

A counter is 0 before and after every launch, because the last program puts it back. Launches that may run at the same
time must not share counters: each stream has its own, and each launch that is captured into a CUDA graph keeps its own
for as long as the process lives, since the graph may be replayed on any stream.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_POOL = 1 << 20  # counters, 4 MB: a graph of a 32-layer model takes some 10,000
_lock = threading.Lock()
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_pools: dict[torch.device, Tensor] = {}
_taken: dict[torch.device, int] = {}


def split_counters(count: int, device: torch.device) -> Tensor:
    """`count` zeros int32 on `device`, for one launch on the current stream."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            return _captured(count, device)
        if device not in _pools:
            _pools[device] = torch.zeros(_POOL, dtype=torch.int32, device=device)
            # Other streams may take counters from here: they have to be zero by then.
            torch.cuda.current_stream(device).synchronize()
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        counters = _by_stream.get(key)
        if counters is None or counters.numel() < count:
            counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            _by_stream[key] = counters
        return counters


def release_captured() -> None:
    """Hand the counters of all captured launches out again, for a process that captures graphs without end.

    Safe when no graph captured before runs at the same time as one captured after this call.
    """
    with _lock:
        _taken.clear()


def _captured(count: int, device: torch.device) -> Tensor:
    pool, first = _pools.get(device), _taken.get(device, 0)
    if pool is None or first + count > pool.numel():
        # No warm-up before the capture, or more graphs than foreseen: the graph itself sets them to zero.
        return torch.zeros(count, dtype=torch.int32, device=device)
    _taken[device] = first + count
    return pool[first : first + count]
