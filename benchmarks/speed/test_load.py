"""The benchmarks under pytest-benchmark: `make bench`. Loading a small checkpoint, merged or not, and plain reading."""

import pytest
import torch

import sliderquant
from benchmarks.speed.load import read_plainly, write_checkpoint
from sliderquant.checkpoint import read_checkpoint
from sliderquant.schemes import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "tiny"
    write_checkpoint(path, "tiny", Scheme.parse("W4A16-g128"), layers=2)
    return path


@pytest.mark.parametrize("merge", [True, False])
def test_load(benchmark, checkpoint, merge):
    benchmark.pedantic(lambda: sliderquant.load(checkpoint, DEVICE, merge=merge), rounds=10, warmup_rounds=1)


def test_plain_reading(benchmark, checkpoint):
    stored = read_checkpoint(checkpoint)
    benchmark.pedantic(lambda: read_plainly(stored, DEVICE), rounds=10, warmup_rounds=1)
