"""Compiling a kernel as a launch would, for a GPU that need not be there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .choices import Choice
from .ptxas import own_ptxas
from .releases import triton_release

_DIVISIBLE = [["tt.divisibility", 16]]
# The first release whose launcher has them; 3.7 was not looked at.
_ENTRIES_OF_CONSTANTS = (3, 8)
# Triton's types of pointers to what kernels read and write.
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Launch:
    """One launch.

    Attributes:
        function: the Triton kernel; None: nothing of ours is launched.
        types: of the arguments that are pointers or floats; `sizes`: of those that are integers, with their values.
        packed_bytes: of the weight that one program takes in a step of its loop; 0 without a loop over a weight.
        elements: of x that one program takes, for ops without a weight.
    """

    choice: Choice
    function: Any = None
    types: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    packed_bytes: int = 0
    elements: int = 0

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile for an architecture such as 90. Raises whatever the compiler throws."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)


def launch_key(launch: Launch, arch: int) -> str:
    """The same for launches that `compile_launch` makes the same code of: by the kernels' source, the types, constants
    and options, the architecture, Triton's release, and the ptxas that takes the place of Triton's own."""
    import triton

    text = f"{triton.__version__} {arch} {_source(launch).hash()} {sorted(launch.options.items())}"
    ptxas, own = os.environ.get("TRITON_PTXAS_PATH"), own_ptxas()
    if ptxas and own is not None and Path(ptxas) != Path(own):
        text += f" {ptxas}"
    return hashlib.sha256(text.encode()).hexdigest()


def _source(launch: Launch) -> Any:
    import triton
    from triton.compiler import ASTSource

    if not isinstance(launch.function, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    # What the launcher's specialization would find: torch aligns tensors, and these sizes are multiples of 16 or not.
    # Triton's cache is looked up by it, so it has to have the entries that say nothing, too: of sizes that are no
    # multiples, and, from 3.8 on, of constants.
    plain = {parameter.name for parameter in launch.function.params if parameter.do_not_specialize}
    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    for position, name in enumerate(launch.function.arg_names):
        if name in launch.types:
            signature[name] = launch.types[name]
            if signature[name].startswith("*"):
                attributes[(position,)] = _DIVISIBLE
        elif name in launch.sizes and (launch.sizes[name] != 1 or name in plain):
            signature[name] = "i32"
            if name not in plain:
                attributes[(position,)] = _DIVISIBLE if launch.sizes[name] % 16 == 0 else []
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, launch.sizes.get(name))
            if triton_release() >= _ENTRIES_OF_CONSTANTS:
                attributes[(position,)] = []
    return ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)
