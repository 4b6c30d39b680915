"""The benchmarks under pytest-benchmark: `make bench`. One-token forward, packed and bf16, of a small shape."""

import pytest
import torch

from benchmarks.decode import _stepper, build, model_bytes
from sliderquant.schemes import Scheme


@pytest.mark.parametrize("scheme", [None, "W4A16-g128", "W2A16-g128", "W8A16"])
def test_one_token(benchmark, scheme):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build("tiny", None if scheme is None else Scheme.parse(scheme), device)
    step = _stepper(model, context=16, longest=2000, device=device)
    benchmark.extra_info["bytes"] = model_bytes(model)
    positions = iter(range(1900))
    benchmark.pedantic(lambda: step(next(positions)), rounds=50, warmup_rounds=5)
