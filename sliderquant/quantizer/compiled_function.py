"""Functions of tensors, compiled so that they round as they do uncompiled.

What torch.compile does before it runs what it compiled (guards, and code that takes arguments apart and puts results
together) takes as long as rounding a small weight. It is decided by the kinds of the arguments: of a kind that has come
before, what was compiled for it is called directly, with the arguments in the places where they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from types import FunctionType
from typing import Any

import torch
import torch._inductor.config
import torch.fx.experimental._config
from torch import Tensor

__all__ = ["compiled_function"]

# Without it a scale that is rounded to 16 bits and widened again would not be rounded.
_OPTIONS = {"emulate_precision_casts": True}
# Division by Triton is not exact; older releases have no such option.
_can_divide = hasattr(getattr(torch._inductor.config, "eager_numerics", None), "division_rounding")
_ON_CUDA = {"eager_numerics.division_rounding": True} if _can_divide else {}


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of contiguous tensors without gradients, and of integers, compiled for any shapes and values of
    them. It depends on nothing else, changes none of its arguments, and returns a tensor, or new ones and None in a
    tuple."""
    # What is compiled is looked up, and limited in number, by the code: every function gets its own.
    code = function.__code__.replace()
    function = FunctionType(code, function.__globals__, closure=function.__closure__)
    runs: list[_Run] = []

    def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in examples)
        program = torch._inductor.compile(graph, list(examples), options=_OPTIONS | (_ON_CUDA if on_cuda else {}))

        def run(*arguments: Any) -> Any:
            results = program(*arguments)
            runs.append(_Run(program, arguments, results))
            return results

        return run

    optimized = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
    known: dict[Any, _DirectCall] = {}
    one_at_a_time = Lock()

    def call(*arguments: Any) -> Any:
        kind = _kind(arguments)
        if kind in known:
            return known[kind](arguments)
        with one_at_a_time:
            runs.clear()
            # A square weight is none of a kind.
            with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                result = optimized(*arguments)
            direct = runs.pop().repeated(arguments, result)
        if direct is not None:
            known[kind] = direct
        return result

    return call


def _kind(arguments: Sequence[Any]) -> Any:
    """All that what is compiled depends on."""
    state = torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    return state, tuple([x if isinstance(x, int) else (x.shape, x.stride(), x.dtype, x.device) for x in arguments])


@dataclass(frozen=True)
class _Run:
    """What was compiled, and what it was given and returned: tensors, and integers that depend on their shapes."""

    program: Callable[..., Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]

    def repeated(self, arguments: Sequence[Any], result: Any) -> "_DirectCall | None":
        """How to run it with other arguments of the same kind; None: these do not tell, one comes twice."""
        places = {id(x): place for place, x in enumerate(arguments) if isinstance(x, Tensor)}
        if len(places) < sum(isinstance(x, Tensor) for x in arguments):
            return None
        inputs = [(places[id(x)], None) if isinstance(x, Tensor) else (None, x) for x in self.inputs]
        outputs = {id(x): place for place, x in enumerate(self.outputs) if isinstance(x, Tensor)}
        if isinstance(result, Tensor):
            return _DirectCall(self.program, inputs, outputs[id(result)])
        return _DirectCall(self.program, inputs, [None if x is None else outputs[id(x)] for x in result])


@dataclass(frozen=True)
class _DirectCall:
    """
    Attributes:
        inputs: of the program, each the place of an argument or a value.
        outputs: the places, among what the program returns, of what the function does.
    """

    program: Callable[..., Any]
    inputs: Sequence[tuple[int | None, Any]]
    outputs: int | Sequence[int | None]

    def __call__(self, arguments: Sequence[Any]) -> Any:
        found = self.program(*[value if place is None else arguments[place] for place, value in self.inputs])
        if isinstance(self.outputs, int):
            return found[self.outputs]
        return tuple([None if place is None else found[place] for place in self.outputs])
