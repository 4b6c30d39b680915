"""The output head of a loaded model is multiplied as rows, whatever slice it is called with."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sliderquant.modules.head import keep_head_fast


class Ops(TorchDispatchMode):
    """The names of the products that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [slice(-1, None), slice(0, None)])
def test_one_product_for_all_sequences(batch: int, rows: slice) -> None:
    head = nn.Linear(8, 5, bias=False).requires_grad_(False)
    hidden = torch.randn(batch, 4, 8)[:, rows]
    expected = hidden.double() @ head.weight.double().T
    keep_head_fast(head)
    with Ops() as ops:
        logits = head(hidden)
    assert logits.shape == expected.shape
    assert (logits.double() - expected).norm() < 1e-6 * expected.norm()
    assert "mm" in ops.seen
    assert "bmm" not in ops.seen


def test_other_arguments_pass() -> None:
    head = nn.Linear(8, 5).requires_grad_(False)
    keep_head_fast(head)
    assert head(torch.randn(8)).shape == (5,)
    assert head(input=torch.randn(2, 8)).shape == (2, 5)
