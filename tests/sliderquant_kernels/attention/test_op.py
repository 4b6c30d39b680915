"""Attention of one token: the kernels against softmax in fp64, in the interpreter or on the GPU."""

import math

import pytest
import torch
from torch import Tensor

from sliderquant_kernels.attention import kernels, op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}


def values(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def oracle(q: Tensor, keys: Tensor, values: Tensor, length: int, mask: Tensor | None, scale: float) -> Tensor:
    q, keys, values = (x.double() for x in (q, keys[:, :, :length], values[:, :, :length]))
    groups = q.shape[1] // keys.shape[1]
    logits = q @ keys.repeat_interleave(groups, 1).mT * scale
    if mask is not None:
        logits = logits + mask[..., :length].double()
    return (logits.softmax(-1) @ values.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "size", "capacity", "length"),
    [
        (1, 1, 1, 16, 16, 1),
        (2, 2, 3, 64, 320, 128),
        (1, 3, 17, 24, 256, 129),
        (3, 1, 8, 128, 512, 511),
        (1, 2, 4, 40, 300, 300),
        (1, 1, 2, 16, 1300, 1299),
    ],
)
def test_against_softmax(
    batch: int, heads: int, groups: int, size: int, capacity: int, length: int, dtype: torch.dtype
) -> None:
    q = values(batch, 1, heads * groups, size, dtype=dtype, seed=1).transpose(1, 2)
    buffers = [values(batch, heads, capacity + 5, size, dtype=dtype, seed=seed)[:, :, :capacity] for seed in (2, 3)]
    for buffer in buffers:
        buffer[:, :, length:] = math.nan  # what is not filled must not be read
    index = torch.tensor([length - 1], device=DEVICE)
    mask = torch.zeros(batch, 1, 1, capacity, dtype=dtype, device=DEVICE)
    mask[:, :, :, : length // 3] = -math.inf  # padding on the left
    mask[0] = 0
    for given in (None, mask):
        found = kernels.decode_attention(q, *buffers, index, given, size**-0.5)
        expected = oracle(q, *buffers, length, given, size**-0.5)
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("largest", [0, -1])
def test_the_largest_logit_comes_first_or_last(largest: int) -> None:
    """Sums of shares that were joined before are scaled when a larger logit turns up."""
    length = (kernels.JOINED + 3) * kernels.SHARE
    q, keys, others = (values(1, 1, n, 16, dtype=torch.float16, seed=n) for n in (1, length, length + 1))
    others = others[:, :, :length]
    keys[0, 0, largest] = q[0, 0, 0] * 2
    index = torch.tensor([length - 1], device=DEVICE)
    found = kernels.decode_attention(q, keys, others, index, None, 0.25)
    expected = oracle(q, keys, others, length, None, 0.25)
    assert (found.double() - expected).norm() <= 2e-3 * expected.norm()


def test_padding_over_whole_shares() -> None:
    q, length = values(1, 2, 1, 32, dtype=torch.float16, seed=1), 3 * kernels.SHARE
    keys, others = (values(1, 1, length, 32, dtype=torch.float16, seed=seed) for seed in (2, 3))
    mask = torch.full((1, 1, 1, length), -math.inf, dtype=torch.float16, device=DEVICE)
    mask[..., 2 * kernels.SHARE + 7 :] = 0
    found = kernels.decode_attention(q, keys, others, torch.tensor([length - 1], device=DEVICE), mask, 0.2)
    expected = oracle(q, keys, others, length, mask, 0.2)
    assert (found.double() - expected).norm() <= 2e-3 * expected.norm()


def test_what_it_refuses() -> None:
    q, keys = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 8, 16)
    assert not op.fits(q, keys, keys, None)
    with pytest.raises(ValueError, match="16-bit queries"):
        op.decode_attention(q, keys, keys, torch.tensor([0]), None, 1.0)
