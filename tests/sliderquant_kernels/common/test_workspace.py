"""Who gets which counters, with a made-up CUDA: launches that may run at the same time share none."""

import threading
from contextlib import contextmanager

import pytest
import torch

from sliderquant_kernels import WeightLayout
from sliderquant_kernels.common import devices, workspace


class _Device:
    """Stands for a CUDA device; the tensors are on the CPU."""

    type = "cuda"

    def __init__(self, index=0):
        self.index = index


@pytest.fixture
def cuda(monkeypatch):
    """An object whose attributes say what the current stream is, and which threads allocated."""

    class State:
        stream, capturing, device = 1, False, 0
        threads, synchronized = [], []

    class Stream:
        def synchronize(self):
            State.synchronized.append(threading.current_thread())

    def zeros(*shape, dtype, device):
        State.threads.append(threading.current_thread())
        return made(*shape, dtype=dtype)

    @contextmanager
    def current(device):
        kept, State.device = State.device, getattr(device, "index", device)
        yield
        State.device = kept

    made = torch.zeros
    State.threads, State.synchronized = [], []
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(devices, "is_capturing", lambda: State.capturing in (True, (State.device,)))
    monkeypatch.setattr(devices, "current_device", lambda: State.device)
    monkeypatch.setattr(devices, "raw_stream", lambda index: State.stream)
    for name in ("_by_stream", "_reserves"):
        monkeypatch.setattr(workspace, name, {})
    return State


def _overlap(a, b):
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in (a, b)]
    return max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1])


def test_one_stream_reuses_its_counters_and_another_has_its_own(cuda):
    device = _Device()
    first = workspace.split_counters(100, device)
    assert workspace.split_counters(50, device) is first
    assert workspace.split_counters(10_000, device).numel() >= 10_000
    cuda.stream = 2
    assert not _overlap(first, workspace.split_counters(100, device))
    cuda.stream = 1
    other = workspace.split_counters(100, _Device(1))
    assert not _overlap(first, other)
    assert cuda.device == 0


def test_captured_launches_share_none(cuda):
    device = _Device()
    eager = workspace.split_counters(100, device)
    cuda.capturing = True
    taken = [workspace.split_counters(count, device) for count in [101] * 40 + [5] * 40 + [101]]
    for i, counters in enumerate(taken):
        assert counters.numel() >= (5 if 40 <= i < 80 else 101)
        assert counters.data_ptr() % 16 == 0
        assert not _overlap(counters, eager)
        assert not any(_overlap(counters, other) for other in taken[:i])
    workspace.release_captured()
    again = [workspace.split_counters(101, device) for _ in range(40)]
    assert any(_overlap(again[0], counters) for counters in taken)
    for i, counters in enumerate(again):
        assert not any(_overlap(counters, other) for other in again[:i])


def test_an_exhausted_or_missing_pool_is_no_error(cuda):
    device = _Device()
    cuda.capturing = True
    assert not workspace.split_counters(7, device).any()
    cuda.capturing = False
    workspace.split_counters(1, device)
    cuda.capturing = True
    kept = workspace.split_counters(workspace._POOL, device)
    assert not _overlap(workspace.split_counters(7, device), kept)


def test_more_streams_than_foreseen_have_counters_too(cuda, monkeypatch):
    monkeypatch.setattr(workspace, "_EAGER", 2 * workspace._SLICE)
    found = []
    for cuda.stream in range(5):
        found.append(workspace.split_counters(3, _Device()))
        assert not any(_overlap(found[-1], other) for other in found[:-1])


def test_nothing_lasting_is_allocated_in_the_caller_s_thread(cuda, monkeypatch):
    """That is what a memory pool is bound to; and other streams find what was written."""
    monkeypatch.setattr(workspace, "_EAGER", workspace._SLICE)
    workspace.reserve(_Device())
    for cuda.stream in range(3):
        workspace.split_counters(5000, _Device())
    assert len(cuda.threads) == 5
    assert threading.current_thread() not in cuda.threads
    assert cuda.synchronized == cuda.threads


def test_whether_the_stream_of_the_tensors_device_is_captured(cuda):
    workspace.reserve(_Device(1))
    cuda.capturing = (1,)  # the current stream of device 1; the current device is another one
    first, second = (workspace.split_counters(100, _Device(1)) for _ in range(2))
    assert not _overlap(first, second)


def test_nothing_is_reserved_during_a_capture(cuda):
    cuda.capturing = True
    workspace.reserve(_Device())
    assert not cuda.threads
    workspace.split_counters(3, _Device())
    assert cuda.threads == [threading.current_thread()]


def test_what_fails_in_the_thread_fails_in_the_caller(cuda):
    with pytest.raises(ZeroDivisionError):
        workspace.outside_pools(lambda: 1 / 0, _Device())


def test_packing_reserves(monkeypatch, make_weight):
    seen = []
    monkeypatch.setattr(workspace, "reserve", seen.append)
    WeightLayout("triton", 4, 32, 64, 32, True).pack(*make_weight(4, 32, 64, 32, True, torch.float16)[:3])
    assert seen == [torch.device("cpu")]


def test_other_devices_need_none_of_it():
    workspace.reserve(torch.device("cpu"))
    assert workspace.split_counters(5, torch.device("cpu")).tolist() == [0] * 5
    assert workspace.outside_pools(lambda: torch.ones(2), torch.device("cpu")).tolist() == [1, 1]
