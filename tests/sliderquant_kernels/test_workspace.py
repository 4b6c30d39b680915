"""Who gets which counters, with a made-up CUDA: launches that may run at the same time share none."""

import pytest
import torch

from sliderquant_kernels import workspace


class _Device:
    """Stands for a CUDA device; the tensors are on the CPU."""

    type = "cuda"


@pytest.fixture
def cuda(monkeypatch):
    """An object whose `stream` and `capturing` say what the current stream is."""

    class State:
        stream, capturing = 1, False

    class Stream:
        cuda_stream = property(lambda self: State.stream)

        def synchronize(self):
            pass

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: State.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for name in ("_by_stream", "_pools", "_taken"):
        monkeypatch.setattr(workspace, name, {})
    return State


def _overlap(a, b):
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in (a, b)]
    return max(spans[0][0], spans[1][0]) < min(spans[0][1], spans[1][1])


def test_one_stream_reuses_its_counters_and_another_has_its_own(cuda):
    device = _Device()
    first = workspace.split_counters(100, device)
    assert _overlap(first, workspace.split_counters(50, device))
    assert workspace.split_counters(10_000, device).numel() >= 10_000
    cuda.stream = 2
    assert not _overlap(first, workspace.split_counters(100, device))


def test_captured_launches_share_none(cuda):
    device = _Device()
    eager = workspace.split_counters(100, device)
    cuda.capturing = True
    taken = [workspace.split_counters(100, device) for _ in range(3)]
    for i, counters in enumerate(taken):
        assert counters.numel() == 100
        assert not _overlap(counters, eager)
        assert not any(_overlap(counters, other) for other in taken[:i])
    workspace.release_captured()
    assert _overlap(workspace.split_counters(100, device), taken[0])


def test_an_exhausted_or_missing_pool_is_no_error(cuda, monkeypatch):
    device = _Device()
    cuda.capturing = True
    assert not workspace.split_counters(7, device).any()
    cuda.capturing = False
    workspace.split_counters(1, device)
    cuda.capturing = True
    kept = workspace.split_counters(workspace._POOL, device)
    assert not _overlap(workspace.split_counters(7, device), kept)


def test_other_devices_need_none_of_it():
    assert workspace.split_counters(5, torch.device("cpu")).tolist() == [0] * 5
