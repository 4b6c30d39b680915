"""The current thread's CUDA state, read as cheaply as Python can, and when an op may skip torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def _cpu_only(*_: Any) -> int:
    return -1


# The functions under `torch.cuda` check for each call whether CUDA is initialized: it is where there is a CUDA tensor.
# A build of torch without CUDA has none of them.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _cpu_only)
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _cpu_only)
on_gpu: Callable[[Tensor], bool] = attrgetter("is_cuda")
_PLAIN = frozenset((Tensor, Parameter))
_NOTHING = nullcontext()


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch._C._cuda_isCurrentStreamCapturing()


def on_device(index: int) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'. index: `Tensor.get_device()`."""
    return _NOTHING if index < 0 or index == current_device() else torch.cuda.device(index)


try:
    _tracers = (
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._autograd._profiler_enabled,
    )
except AttributeError:  # a torch that names them otherwise: always ask the dispatcher
    _tracers = (lambda: True,) * 5  # type: ignore[assignment]
_dispatch_modes, _function_modes, _transforms, _tracing_state, _profiling = _tracers


def nothing_traces() -> bool:
    """Whether no compiler, mode, transform or tracer would see an op."""
    # The compiler first: it must not trace the other questions.
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _transforms() or _tracing_state()
    )


def nothing_watches() -> bool:
    """Whether nobody would see an op: nothing that traces, and no profiler that shows its name."""
    return nothing_traces() and not _profiling()


def may_skip_dispatcher(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether an op on these tensors comes down to its CUDA implementation: plain CUDA tensors, and nothing that the
    dispatcher would tell, such as a gradient that is asked for."""
    return nothing_watches() and are_plain(x, others)


def are_plain(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    """Whether these are plain CUDA tensors whose gradients are not asked for."""
    if type(x) not in _PLAIN or not on_gpu(x):
        return False
    for tensor in others:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    if torch.is_grad_enabled():
        return not (x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in others))
    return True
