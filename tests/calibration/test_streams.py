import pytest
import torch

from sliderquant.calibration.streams import ActivationStream


@pytest.mark.parametrize("memory_limit", [0, 1e9])
def test_memory_and_file_hold_the_same(memory_limit):
    stream = ActivationStream(5, 3, 4, memory_limit)
    assert stream.in_file == (memory_limit == 0)
    samples = torch.randn(5, 1, 3, 4)
    stream.fill(samples)
    assert torch.equal(stream.batch(torch.tensor([3, 1]), torch.device("cpu")), samples[[3, 1], 0])
    other = stream.like()
    assert other.in_file == stream.in_file
    stream.walk(lambda x: x * 2, torch.device("cpu"), 2, into=other)
    assert torch.equal(other.data, samples[:, 0] * 2)
    assert torch.equal(stream.data, samples[:, 0])
    stream.walk(lambda x: x + 1, torch.device("cpu"), 2)
    assert torch.equal(stream.data, samples[:, 0] + 1)


def test_the_file_goes_with_the_stream():
    from pathlib import Path

    stream = ActivationStream(2, 2, 2, memory_limit=0)
    folder = Path(stream._folder.name)
    assert folder.exists()
    stream.close()
    assert not folder.exists()


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        ActivationStream(3, 2, 2, 1e9).fill(torch.zeros(2, 1, 2, 2))
