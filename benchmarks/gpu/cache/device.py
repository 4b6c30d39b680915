"""A GPU that is not there: tensors that say they are on it, and launches that end where Triton would compile.

Everything above the compiler runs as on the GPU: the choice of kernels and tiles, Triton's own specialization of a
launch, the ops' CUDA implementations. What reaches the compiler is noted and compiled nowhere, so a launch leaves its
outputs as they were. Tensors with few elements hold values in main memory, larger ones hold none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

__all__ = ["ARCH", "absent_gpu"]

ARCH = 90
# Both an H100 and an H200, in what kernels and tiles are chosen by.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block_optin=232448, max_threads_per_multi_processor=2048, warp_size=32,
    regs_per_multiprocessor=65536, gcnArchName="", is_integrated=False,
)  # fmt: skip
DEVICE = torch.device("cuda", 0)
# What torch allocates on a GPU is aligned to 512 bytes, and Triton looks at addresses.
ADDRESS = 1 << 30


class _OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU; `inner`, on the CPU or without values, computes for it.

    For torch's C++ code it is where `inner` is: for a device whose driver is absent, that code raises.
    """

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=inner.device,
        )  # fmt: skip
        made.inner = inner
        return made

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: DEVICE)

    def get_device(self) -> int:
        return DEVICE.index

    def data_ptr(self) -> int:
        return ADDRESS + self.inner.storage_offset() * self.inner.element_size()

    def __repr__(self, *_: Any) -> str:
        return f"_OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Has what is made on the GPU be an `_OnGpu`.

    largest: elements of the largest tensor with values.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            return _run(func, args, kwargs or {})


_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


class _Moves(TorchFunctionMode):
    """Moves tensors to the GPU and back, which torch's C++ code would not know of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return _moved(args[0], DEVICE, None)
        if func is torch.Tensor.cpu:
            return _moved(args[0], torch.device("cpu"), None)
        if func is torch.Tensor.to:
            device, dtype = _destination(*args[1:], **kwargs)
            if device is not None:
                return _moved(args[0], device, dtype)
        if func in _FROM_DATA and _indexed(kwargs.get("device")) == DEVICE:
            # These initialize CUDA themselves.
            return _moved(func(*args, **{**kwargs, "device": "cpu"}), DEVICE, None)
        args = tuple(_indexed(value) for value in args)
        return func(*args, **{name: _indexed(value) for name, value in kwargs.items()})


def _destination(*args: Any, copy: bool = False, other: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """Device and dtype that `Tensor.to` is called with."""
    like = args[0] if args and isinstance(args[0], torch.Tensor) else other
    if like is not None:
        return like.device, like.dtype
    if args and isinstance(args[-1], bool):  # copy, which the parser does not know
        args = args[:3]
    device, dtype, *_ = torch._C._nn._parse_to(*map(_indexed, args), **kwargs)
    return device, dtype


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    if isinstance(tensor, _OnGpu) == (device.type == "cuda"):
        return tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
    where = DEVICE if device.type == "cuda" else device
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=where)


def _indexed(value: Any) -> Any:
    """The GPU by its index: torch asks the CUDA driver for that of a device without one."""
    if isinstance(value, str) and value == "cuda":
        return DEVICE
    return DEVICE if isinstance(value, torch.device) and value.type == "cuda" else value


_mode: _Mode | None = None
_note: Callable[[Any, Any, Any], None] | None = None


def _compile(src: Any, target: Any = None, options: Any = None, **_: Any) -> None:
    """Triton's compiler. A kernel that was launched once keeps it, so this process can launch no other way after."""
    if _note is None:
        raise RuntimeError("kernels that were recorded in this process can no more be compiled in it; use another one")
    _note(src, target, options)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func.namespace == "sliderquant_kernels" and _has_gpu((args, kwargs)):
        return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    with _disable_current_modes():
        return _compute(func, args, kwargs)


def _has_gpu(values: Any) -> bool:
    found: list[bool] = []
    tree_map(lambda value: found.append(True) if isinstance(value, _OnGpu) else None, values)
    return bool(found)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given = _has_gpu((args, kwargs))
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    # Functions of torch that consist of others ask for tensors where they think that this one is.
    on_gpu = given if device is None or (given and name != "_to_copy") else device.type == "cuda"
    args, kwargs = tree_map(_inner, (args, kwargs))
    if name in ("_local_scalar_dense", "item", "is_nonzero") and args[0].is_meta:
        return torch.zeros((), dtype=args[0].dtype).item()
    if name in ("all", "any") and len(args) == 1 and args[0].is_meta:
        return _OnGpu(torch.tensor(name == "all"))  # what is checked before a launch is right
    if name == "equal" and (args[0].is_meta or args[1].is_meta):
        return True
    if name == "copy_" and args[1].is_meta and not args[0].is_meta:
        return args[0].zero_() if not given else _OnGpu(args[0].zero_())
    if device is not None and device.type == "cuda":
        kwargs["device"] = torch.device("cpu")
        assert _mode is not None
        if _elements(args) > _mode.largest:
            kwargs["device"] = torch.device("meta")
            if "generator" in kwargs:
                kwargs["generator"] = None
        kwargs.pop("pin_memory", None)
    elif device is not None and device.type == "cpu" and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    result = func(*args, **kwargs)
    if not on_gpu:
        return result
    if name in ("empty", "new_empty", "empty_like"):
        result.zero_()  # what kernels leave as it was must be the same every time
    return tree_map(lambda value: _OnGpu(value) if type(value) is torch.Tensor else value, result)


def _elements(args: tuple[Any, ...]) -> int:
    """Of the tensor that a function makes: as many as its first argument has, or of the shape among them."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].numel()
    return torch.Size(next((value for value in args if isinstance(value, (list, tuple))), ())).numel()


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, _OnGpu) else value


class _Nothing:
    """Stands for streams, events and graphs: takes any call, and is a context."""

    cuda_stream = 0
    device = DEVICE
    device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0.0 if name == "elapsed_time" else None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Driver:
    """Triton's driver of the GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def absent_gpu(note: Callable[[Any, Any, Any], None], largest: int = 1 << 26) -> Iterator[None]:
    """Have this process use a GPU with the properties of an H100 that is not there.

    Other threads see it too. Within it `torch.compile` returns what it is given: the launches of ours are the same.
    What was launched within it, this process cannot launch afterwards.

    Args:
        note: called with what Triton's compiler would get: the source, the target, the options.
        largest: elements of the largest tensor on the GPU that has values; a larger one has none.
    """
    global _mode, _note
    import torch._dynamo  # it looks at what is replaced here, and torch imports it later by itself
    import triton
    from triton.runtime.driver import driver

    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value, create=True))

        for name, value in _cuda().items():
            replace(torch.cuda, name, value)
        for name, value in {
            "_cuda_getDevice": lambda: 0,
            "_cuda_getCurrentRawStream": lambda index: 0,
            "_cuda_isCurrentStreamCapturing": lambda: False,
        }.items():
            replace(torch._C, name, value)
        replace(torch, "compile", lambda model=None, **_: (lambda given: given) if model is None else model)
        replace(torch, "Generator", _Generator)
        # Wrappers count versions, which tensors of the inference mode have none of.
        replace(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else torch.enable_grad())
        active = driver._active
        driver.set_active(_Driver())
        stack.callback(driver.set_active, active)  # type: ignore[arg-type]
        replace(triton, "compile", _compile)
        replace(triton.compiler, "compile", _compile)
        _stand_in(replace)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        _mode, _note = _Mode(largest), note
        mode = _mode
        start = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            with _Moves(), mode:
                start(thread)

        replace(threading.Thread, "run", run)
        stack.enter_context(_Moves())
        stack.enter_context(mode)
        try:
            yield
        finally:
            _mode = _note = None


def _stand_in(replace: Callable[[Any, str, Any], None]) -> None:
    """What the kernels have taken from torch when they were imported; they must not see what stands for the GPU."""
    from sliderquant_kernels.common import devices

    replace(devices, "current_device", lambda: 0)
    replace(devices, "raw_stream", lambda index: 0)
    replace(devices, "_PLAIN", devices._PLAIN | {_OnGpu})
    replace(devices, "_dispatch_modes", lambda: 0)
    replace(devices, "_function_modes", lambda: 0)


class _Generator(torch._C.Generator):
    """Random numbers of the CPU, of a generator that says it is where it was asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.where = torch.device(_indexed(device))
        return made

    device = property(lambda self: self.where)


def _cuda() -> dict[str, Any]:
    """What `torch.cuda` says."""
    nothing, none = _Nothing(), lambda *args, **kwargs: None
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": none, "init": none,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": none,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda *_: PROPERTIES, "get_device_name": lambda *_: PROPERTIES.name,
        "is_bf16_supported": lambda *args, **kwargs: True, "mem_get_info": lambda *_: (PROPERTIES.total_memory,) * 2,
        "is_current_stream_capturing": lambda: False, "synchronize": none, "empty_cache": none,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": none,
        "memory_reserved": lambda *_: 0, "max_memory_reserved": lambda *_: 0, "manual_seed_all": none,
        "current_stream": lambda *_: nothing, "default_stream": lambda *_: nothing, "stream": _Nothing,
        "Stream": _Nothing, "Event": _Nothing, "CUDAGraph": _Nothing, "graph": _Nothing, "device": _Nothing,
    }  # fmt: skip
