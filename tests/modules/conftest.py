"""What tests of compiled modules share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def count_products(program: torch.fx.GraphModule) -> int:
    ops = ("weight_only_linear", "low_bit_linear")
    return sum(any(op in str(node.target) for op in ops) for node in program.graph.nodes)


class Programs:
    """A backend that runs what was traced as it is, and notes the products in each program."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.products: list[int] = []

    def __call__(self, program: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.products.append(count_products(program))
        return program.forward


@pytest.fixture
def programs() -> type[Programs]:
    return Programs
