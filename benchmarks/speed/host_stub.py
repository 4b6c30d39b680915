"""A GPU that does nothing, for measuring what a call costs before its launch on machines without one.

Kernels are compiled for it as for an H100, and launched by everything that launches them on a GPU, up to the call of
the compiled kernel, which is replaced by a function that returns at once. Tensors on the CPU stand for those on it.
Within the context alone, of one thread, in a process that does not interpret Triton's kernels.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sliderquant.modules import linear as modules
from sliderquant_kernels.activations import op as activations
from sliderquant_kernels.common import devices
from sliderquant_kernels.common.choices import Device
from sliderquant_kernels.low_bit import cpu as low_bit_cpu
from sliderquant_kernels.low_bit import layout as low_bit_layout
from sliderquant_kernels.rotation import op as rotation
from sliderquant_kernels.weight_only import cpu, layout

__all__ = ["LAUNCHES", "stubbed_gpu"]

H100 = Device.typical(90)
# The arguments of each launch, if it is a list.
LAUNCHES: list[tuple[Any, ...]] | None = None


class _Launcher:
    """What Triton makes for a compiled kernel; the arguments are those of Triton 3.8 and 3.9."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
                 launch_exit_hook, *args):  # fmt: skip
        if LAUNCHES is not None:
            LAUNCHES.append((gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata,
                             launch_enter_hook, launch_exit_hook, *args))  # fmt: skip


class _Driver:
    """Triton's driver of the GPU."""

    launcher_cls = _Launcher

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H100.arch, 32)

    def get_current_device(self) -> int:
        return -1  # that of tensors on the CPU

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stubbed_gpu() -> Iterator[None]:
    """Have tensors on the CPU stand for tensors on a GPU.

    Raises:
        RuntimeError: TRITON_INTERPRET is set: kernels are interpreted and never launched.
    """
    from sliderquant_kernels.activations import kernels as activations_triton
    from sliderquant_kernels.low_bit import launch as low_bit_launch
    from sliderquant_kernels.rotation import launch as hadamard_launch
    from sliderquant_kernels.weight_only import launch as weight_only_triton

    if not isinstance(activations_triton.quantize_kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and nothing is launched; unset it")
    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what waits for others is not ours
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of ops that are overridden
        active = driver._active
        driver.set_active(_Driver())
        stack.callback(driver.set_active, active)  # type: ignore[arg-type]
        # What the dispatcher calls for tensors on the CPU ends in the functions that launch.
        replace(cpu, "weight_only_linear", lambda x, w, s, z, bias, residual, of, invariant:
                weight_only_triton.weight_only_linear(x, w, s, bias, residual, of, None, invariant))  # fmt: skip
        replace(low_bit_cpu, "low_bit_linear", low_bit_launch.low_bit_linear)
        library = torch.library.Library("sliderquant_kernels", "IMPL")
        stack.callback(library._destroy)
        for name, function in (
            ("quantize_activations", activations._on_cuda),
            ("hadamard", rotation._hadamard_cuda),
            ("hadamard_quantize", rotation._quantize_cuda),
        ):
            library.impl(name, function, "CPU", allow_override=True)
        for module in (weight_only_triton, low_bit_launch, hadamard_launch):
            replace(module, "device_of", lambda tensor: H100)
        for kind in (layout.WeightLayout, low_bit_layout.LowBitLayout):
            replace(kind, "device_type", property(lambda self: "cpu"))
        replace(modules, "choose_layout", lambda *shape: layout.WeightLayout("triton", *shape[:5]))
        replace(modules, "choose_low_bit_layout", lambda *shape: low_bit_layout.LowBitLayout("triton_int8", *shape[:5]))
        replace(devices, "on_gpu", attrgetter("is_cpu"))
        replace(devices, "current_device", lambda: -1)
        replace(devices, "raw_stream", lambda index: 0)
        yield
