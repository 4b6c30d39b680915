"""What the floors are made of, and files from before reading was one of them."""

import pytest
import torch

from benchmarks.kernels.harness import floors
from benchmarks.kernels.harness.floors import Floors
from sliderquant_kernels.tools.timing import Settings, Timing

SIZE = 1 << 20


@pytest.fixture
def timed(monkeypatch):
    """The calls of each floor, which all took 100 us."""
    found = []

    def in_turns(calls, baseline, settings):
        found.append(calls)
        return Timing([100.0] * 5, baseline, 1, "made up")

    monkeypatch.setattr(floors, "BUFFER_BYTES", {"cpu": SIZE})
    monkeypatch.setattr(floors, "in_turns", in_turns)
    return found


def test_bytes_are_moved_by_kernels_over_buffers_in_turns(timed):
    found = floors.measure(torch.device("cpu"))
    assert found == Floors(2 * SIZE / 100e3, 2 * 1024**3 / 100e6, 0.0, SIZE / 100e3)
    copies, reads, matmuls = timed
    assert [len(calls) for calls in timed] == [floors.BUFFERS, floors.BUFFERS, 1]
    targets = [call() for call in copies]
    assert len({target.data_ptr() for target in targets}) == floors.BUFFERS
    for target, copy, read in zip(targets, copies, reads, strict=True):
        # Not `copy_`, which is a memcpy and no kernel.
        assert copy.func is torch.bitwise_not
        (source,) = copy.args
        assert source.nbytes == SIZE
        assert torch.equal(target, ~source)
        assert len(source.unique()) > source.numel() // 2
        assert torch.equal(read(), source.view(-1, floors.ROW).amax(1))
    assert matmuls[0]().shape == (1024, 1024)


def test_on_this_cpu(monkeypatch):
    monkeypatch.setattr(floors, "BUFFER_BYTES", {"cpu": SIZE})
    monkeypatch.setattr(floors, "SETTINGS", Settings(budget_us=1000.0, fewest_samples=2, most_samples=2))
    found = floors.measure(torch.device("cpu"))
    assert min(found.copy_gbps, found.read_gbps, found.matmul_tflops) > 0
    assert found.empty_kernel_us == 0


def test_the_roof_is_the_better_of_copying_and_reading():
    old = Floors(**{"copy_gbps": 2771.0, "matmul_tflops": 674.0, "empty_kernel_us": 0.93})
    assert (old.read_gbps, old.bandwidth_gbps) == (0.0, 2771.0)
    new = Floors(3900.0, 700.0, 1.0, 4300.0)
    assert new.bandwidth_gbps == 4300.0
    assert new.floor_us(43e6, 0.0) == pytest.approx(10.0)
    assert old.better(new) == new.better(old) == Floors(3900.0, 700.0, 0.93, 4300.0)
    assert Floors(**new.as_dict()) == new
