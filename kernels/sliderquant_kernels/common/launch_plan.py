"""Launching a Triton kernel again without Triton's host code, which takes 12 microseconds or more for each launch.

The first launch goes through Triton's JIT, which compiles. What it returns is kept, and later launches call its `run`
directly, with addresses instead of tensors. That is only right for a launch that the JIT would have given the same
compiled kernel: a `Launcher` belongs to one kernel with its constants, its options, the dtypes of its tensors (None
where there is none), the integers that the kernel is specialized for, and a device; addresses have to be multiples of
16 bytes. Everything else, and releases of Triton that this module does not know, goes through the JIT.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from . import devices
from .checks import ALIGNMENT

# The JIT compiles another kernel for an address that is not a multiple of this many bytes.
# These hand `run` its arguments in the order below without naming all of them.
_KNOWN_RELEASES = ((3, 4), (3, 9))
_RUN_ARGUMENTS = ("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata",
                  "launch_enter_hook", "launch_exit_hook")  # fmt: skip
_MOST_PLANS = 8192

Grid = tuple[int, int, int]
Recorder = Callable[["Launcher", "Dtypes", tuple[Any, ...]], None]
Dtypes = tuple[torch.dtype | None, ...]


def _release() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in triton.__version__.split(".")[:2])
    except ValueError:
        return ()


class PlanCache(dict[Hashable, Any]):
    """Plans by what they depend on. Starts anew when a process has made very many of them."""

    def __setitem__(self, key: Hashable, plan: Any) -> None:
        if len(self) >= _MOST_PLANS:
            self.clear()
        super().__setitem__(key, plan)

    def keep(self, key: Hashable, plan: Any) -> Any:
        """`plan`, which `get(key)` finds from now on."""
        self[key] = plan
        return plan


class Launcher:
    """Launches of one kernel with everything that its compilation depends on."""

    __slots__ = ("_can_keep", "_compiled", "_constants", "_function", "_index", "_keywords", "_metadata",
                 "_pre_run_hooks", "_run", "constants", "kernel", "options")  # fmt: skip

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any], index: int) -> None:
        """
        Args:
            kernel: what `triton.jit` made.
            constants: all its compile-time arguments; in its signature they follow the others.
            options: Triton's.
            index: of the CUDA device.
        """
        self.kernel, self.constants, self.options, self._index = kernel, constants, options, index
        self._keywords = {**constants, **options}
        self._run: Any = None
        self._compiled: Any = None
        self._constants: tuple[Any, ...] = ()
        self._pre_run_hooks: Any = ()
        self._can_keep = isinstance(kernel, triton.JITFunction)
        if self._can_keep:
            names = list(kernel.arg_names)
            last = names[len(names) - len(constants) :]
            self._can_keep = set(last) == set(constants)
            self._constants = tuple(constants[name] for name in last if name in constants)
            self._pre_run_hooks = getattr(kernel, "pre_run_hooks", ())

    def __call__(self, grid: Grid, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
        """Launch on the current stream of the device.

        Args:
            tensors, numbers: the kernel's arguments before the constants, in the order of its signature.
        """
        run, index, runtime = self._run, self._index, _runtime
        if run is None or index != devices.current_device() or self._pre_run_hooks:
            self._launch_by_jit(grid, tensors, numbers)
            return
        # A chain without calls in newer releases of Triton, None in older ones, a function where a user put it.
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            self._launch_by_jit(grid, tensors, numbers)
            return
        addresses: list[int | None] = []
        together = 0
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                together |= address
                addresses.append(address)
        if together % ALIGNMENT:
            self._launch_by_jit(grid, tensors, numbers)
            return
        run(*grid, devices.raw_stream(index), self._function, self._metadata, None, None, None,
            *addresses, *numbers, *self._constants)  # fmt: skip

    def _launch_by_jit(self, grid: Grid, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
        recorder = getattr(_recording, "recorder", None)
        if recorder is not None:
            recorder(self, tuple(map(dtype_of, tensors)), numbers)
            return
        # Triton launches on the current device, which need not be the tensors'.
        with devices.on_device(self._index):
            compiled = self.kernel[grid](*tensors, *numbers, **self._keywords)
            # The kernel for addresses that are not multiples is another one.
            odd = any(tensor is not None and tensor.data_ptr() % ALIGNMENT for tensor in tensors)
            if self._run is None and self._can_keep and not odd:
                self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        run = getattr(compiled, "run", None)
        function, metadata = getattr(compiled, "function", None), getattr(compiled, "packed_metadata", None)
        if function is None or metadata is None or not _takes_our_arguments(run):
            self._can_keep = False
            return
        self._compiled, self._function, self._metadata = compiled, function, metadata
        self._run = run

    def prepare(self, dtypes: Dtypes, numbers: tuple[Any, ...], grid: Grid = (1, 1, 1)) -> bool:
        """Compile and load without a launch; whether the next launch can go directly."""
        if self._run is None and self._can_keep:
            with devices.on_device(self._index):
                compiled = self.kernel.warmup(*dtypes, *numbers, grid=grid, **self._keywords)
                load = getattr(compiled, "_init_handles", None)
                if load is not None:
                    load()
                self._keep(compiled)
        return self._run is not None


_launchers = PlanCache()
# Of the thread that records: the launches of others are none of its business.
_recording = threading.local()


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Call `recorder` in place of every launch of this thread whose kernel is not compiled yet: without a result."""
    _recording.recorder = recorder
    try:
        yield
    finally:
        _recording.recorder = None


def launch(
    kernel: Any,
    grid: Grid,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch a kernel by its launcher, on the device of the first tensor."""
    index = next(tensor for tensor in tensors if tensor is not None).get_device()
    launcher = launcher_for(kernel, constants, options, index, tuple(map(dtype_of, tensors)), numbers)
    launcher(grid, tensors, numbers)


def launcher_for(
    kernel: Any,
    constants: dict[str, Any],
    options: dict[str, Any],
    index: int,
    dtypes: Dtypes,
    numbers: tuple[Any, ...],
) -> Launcher:
    """The launcher of a kernel for such arguments; see the top of the module for what it depends on.

    Args:
        dtypes: of the tensors, None where there is none.
        numbers: the arguments between the tensors and the constants.
    """
    # By identity, which a launcher keeps from being another's: Triton hashes the source.
    key = (id(kernel), tuple(constants.items()), tuple(options.items()), index, dtypes,
           _specialization(kernel, len(dtypes), numbers))  # fmt: skip
    found = _launchers.get(key)
    return _launchers.keep(key, Launcher(kernel, constants, options, index)) if found is None else found


def _specialization(kernel: Any, first: int, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of the numbers a compiled kernel depends on; `first`: the position of the first of them."""
    parameters = getattr(kernel, "params", None)
    found: list[Any] = []
    for position, number in enumerate(numbers, first):
        if isinstance(number, int) and parameters is not None and parameters[position].do_not_specialize:
            found.append((int, -(2**31) <= number < 2**31))
        else:
            found.append(float if isinstance(number, float) else number)
    return tuple(found)


def _takes_our_arguments(run: Any) -> bool:
    """Whether a compiled kernel's `run` is called as this module calls it, in this release of Triton."""
    if not callable(run) or not all(hasattr(_runtime, name) for name in _RUN_ARGUMENTS[-2:]):
        return False
    try:
        parameters = list(inspect.signature(run).parameters.values())
    except (TypeError, ValueError):
        return False
    named = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != len(named) + 1 or parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return False
    oldest, newest = _KNOWN_RELEASES
    return named == _RUN_ARGUMENTS or (named == _RUN_ARGUMENTS[: len(named)] and oldest <= _release() <= newest)


_runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    """None of None."""
    return None if tensor is None else tensor.dtype
