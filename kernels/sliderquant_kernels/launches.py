"""What a launch of each op comes down to: the kernel, the types of its arguments, its constants.

For compiling it without a GPU; everything is taken from where the launch itself takes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import int8_fragments, tiles
from .fragments import block_bytes, weight_shape
from .hadamard_matrix import factor_hadamard
from .hadamard_tiles import choose_hadamard
from .layout import WeightLayout
from .low_bit_layout import LowBitLayout
from .low_bit_tiles import choose_low_bit
from .problems import Case
from .ptxas import own_ptxas
from .releases import triton_release
from .tiles import Choice, Device

_DIVISIBLE = [["tt.divisibility", 16]]
# The first release whose launcher has them; 3.7 was not looked at.
_ENTRIES_OF_CONSTANTS = (3, 8)
_CLIP = {"clip_low": "fp32", "clip_high": "fp32"}
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Triton's types of pointers to what kernels read and write.
POINTERS = {**_POINTER, torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}


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


def describe_launch(case: Case, arch: int, choice: Choice | None = None) -> Launch:
    """The launch of a case on the device that stands for an architecture; with `choice`, for a weight-only linear
    alone, by that tile instead of the one that the rules choose."""
    device = Device.typical(arch)
    return _BUILDERS[case.op](case, device) if choice is None else _weight_only(case, device, choice)


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


def _weight_only(case: Case, device: Device, choice: Choice | None = None) -> Launch:
    from . import matmul_triton as kernels
    from . import weight_only_triton as host

    problem, values = case.problem, _POINTER[case.problem.dtype]
    if choice is None:
        choice = tiles.choose(replace(problem, m=max(problem.m, host.FEWEST_TOKENS)), device, case.variant)
    if choice.variant == "dense":
        return Launch(choice)
    types = {"weight_ptr": "*u8", "partial_ptr": "*fp32", "counter_ptr": "*i32"}
    types |= dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "residual_ptr", "y_ptr"), values)
    if not case.epilogue:
        del types["bias_ptr"], types["residual_ptr"]
    if choice.split == 1:
        del types["partial_ptr"], types["counter_ptr"]
    warp_k = choice.variant == "warp_k"
    return Launch(
        choice,
        kernels.warp_k_kernel if warp_k else kernels.rows_kernel,
        types,
        _sizes(case),
        host.matmul_constants(problem, choice, device.arch),
        host.matmul_options(choice, device.arch),
        packed_bytes=choice.row_blocks * (choice.num_warps if warp_k else 1) * block_bytes(problem.bits),
    )


def _dequantize(case: Case, device: Device) -> Launch:
    from . import matmul_triton as kernels
    from . import weight_only_triton as host

    problem, values = case.problem, _POINTER[case.problem.dtype]
    layout = WeightLayout("triton", problem.bits, problem.n, problem.k, problem.group_size, problem.symmetric)
    return Launch(
        Choice("dequantize", num_warps=4, num_stages=1),
        kernels.dequantize_kernel,
        {"weight_ptr": "*u8", "scale_ptr": values, "out_ptr": values},
        _sizes(case),
        host.dequantize_constants(layout, problem.dtype),
        host.DEQUANTIZE_OPTIONS,
    )


def _sizes(case: Case, shape: Callable[..., tuple[int, int, int]] = weight_shape) -> dict[str, int]:
    problem = case.problem
    row_blocks, k_blocks, _ = shape(problem.n, problem.k, problem.bits)
    return {"M": problem.m, "N": problem.n, "K": problem.k, "row_blocks": row_blocks, "k_blocks": k_blocks}


def _low_bit(case: Case, device: Device) -> Launch:
    from . import low_bit_launch as host
    from . import low_bit_triton as kernels

    problem = case.problem
    layout = LowBitLayout("triton_int8", problem.bits, problem.n, problem.k, problem.group_size, problem.symmetric)
    m = max(problem.m, host.FEWEST_TOKENS)
    choice = choose_low_bit(m, problem.n, problem.k, problem.bits, problem.group_size, device, case.variant)
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sum_ptr": "*i32", "scale_ptr": "*fp32",
             "constant_ptr": "*i32", "y_ptr": _POINTER[problem.dtype]}  # fmt: skip
    if case.epilogue:
        types |= {"bias_ptr": types["y_ptr"], "residual_ptr": types["y_ptr"]}
    groups = int8_fragments.groups_of(problem.k, problem.bits, problem.group_size)
    sizes = _sizes(case, int8_fragments.weight_shape) | {"groups": groups}
    functions = {
        "warp_k": kernels.low_bit_warp_k_kernel,
        "rows": kernels.low_bit_rows_kernel,
        "tiles": kernels.int8_tiles_kernel,
    }
    constants = host.matmul_constants(layout, choice, device.arch)
    if choice.variant == "tiles":
        sizes["NP"] = sizes.pop("row_blocks") * int8_fragments.ROWS
        packed_bytes = 0
    else:
        blocks = constants["W"] if choice.variant == "warp_k" else max(constants["JOINED"], 1)
        packed_bytes = choice.row_blocks * blocks * int8_fragments.BYTES
    return Launch(
        choice,
        functions[choice.variant],
        types | {"weight_ptr": "*i8" if choice.variant == "tiles" else "*u8"},
        sizes,
        constants,
        host.matmul_options(choice),
        packed_bytes=packed_bytes,
    )


def _quantize(case: Case, device: Device) -> Launch:
    from . import activations_triton as host

    problem, values = case.problem, _POINTER[case.problem.dtype]
    types = {"x_ptr": values, "codes_ptr": "*i8", "scale_ptr": "*fp32", "sum_ptr": "*i32", "eps": "fp32"}
    if not problem.symmetric:
        types["zero_ptr"] = "*i32"
    if case.variant == "rms_norm":
        types["norm_ptr"] = values
    if case.variant == "silu_mul":
        types["gate_ptr"] = values
    if case.variant == "clipped":
        types |= _CLIP
    options = host.quantize_options(problem.k)
    return Launch(
        Choice(case.variant or "quantize", num_warps=options["num_warps"], num_stages=1),
        host.quantize_kernel,
        types,
        {"K": problem.k},
        host.quantize_constants(problem.k, problem.bits, problem.symmetric, packed=False),
        options,
        elements=problem.k,
    )


def _hadamard(case: Case, device: Device) -> Launch:
    from . import hadamard_axis_triton as axis
    from . import hadamard_launch as host
    from . import hadamard_triton as kernels

    problem, values = case.problem, _POINTER[case.problem.dtype]
    transform = factor_hadamard(problem.k)
    chosen = choose_hadamard(transform.orders, device, problem.dtype, case.variant in (None, "clipped", "second"))
    if chosen.variant == "matmul":
        return Launch(Choice("matmul"))
    # The first of two launches does not quantize.
    bits = 0 if chosen.leading > 1 and case.variant != "second" else problem.bits
    operand = _POINTER[host.x_operand(problem.dtype)]
    types = {"x_ptr": values, "y_ptr": "*i8" if bits else values, "left_ptr": operand, "right_ptr": operand}
    types |= {"gate_ptr": values} if case.variant == "silu_mul" else {}
    types |= {"before_ptr": values} if case.variant == "signs" else {}
    types |= _CLIP if case.variant == "clipped" and bits else {}
    if bits:
        types |= {"scale_ptr": "*fp32", "sum_ptr": "*i32"} | ({} if problem.symmetric else {"zero_ptr": "*i32"})
    constants = {"BITS": bits, "SYMMETRIC": problem.symmetric, "IEEE": False, "PERIOD": 1}
    tile = Choice(chosen.variant, sum(chosen.sizes) or host.ROWS, chosen.q * chosen.padded_b // 16,
                  chosen.num_warps, max(chosen.num_stages, 1))  # fmt: skip
    if case.variant == "second":
        constants |= host.leading_constants(chosen.leading, problem.k // chosen.leading, problem.dtype)
        options = host.leading_options(chosen.leading)
        size = constants["PADDED_L"]
        tile = Choice("second", size, host.COLUMNS // 16, options["num_warps"], options["num_stages"])
        return Launch(tile, axis.leading_kernel, types, {}, constants, options)
    if chosen.variant == "rows":
        constants |= host.rows_constants(chosen, problem.dtype)
        elements = host.ROWS * problem.k
        return Launch(tile, axis.rows_kernel, types, {"M": 4096}, constants, host.ROWS_OPTIONS, elements=elements)
    types["right_ptr"] = _POINTER[host.part_operand()]
    constants |= host.row_constants(chosen, problem.dtype)
    elements = problem.k // chosen.leading
    return Launch(
        tile, kernels.row_kernel, types, {"M": 4096}, constants, host.row_options(chosen), elements=elements
    )  # fmt: skip


def _elementwise(case: Case, device: Device) -> Launch:
    from . import elementwise_triton as host

    k, values = case.problem.k, _POINTER[case.problem.dtype]
    if case.op == "rms_norm":
        launch = Launch(Choice(case.op), host.rms_norm_kernel, {"eps": "fp32"}, {"K": k}, *host.rms_norm_options(k))
    elif case.op == "silu_mul":
        launch = Launch(Choice(case.op), host.silu_mul_kernel, {}, {"K": k}, *host.silu_mul_options())
    else:
        launch = Launch(Choice(case.op), host.rotary_kernel, {}, {}, *host.rotary_options(k))
    launch.types |= {name: values for name in launch.function.arg_names if name.endswith("_ptr")}
    # Strides and numbers of heads, which nothing is specialized for.
    plain = {parameter.name for parameter in launch.function.params if parameter.do_not_specialize}
    launch.sizes |= dict.fromkeys(plain, 1)
    return launch


def _decode_attention(case: Case, device: Device) -> Launch:
    from . import decode_attention_triton as host

    problem, values = case.problem, _POINTER[case.problem.dtype]
    types = {"sum_ptr": "*fp32", "most_ptr": "*fp32", "total_ptr": "*fp32", "index_ptr": "*i64"}
    if case.variant == "join":
        types |= {"y_ptr": values}
        launch = Launch(Choice("join"), host.join_kernel, types, {}, *host.join_options(problem.k))
    else:
        types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "mask_ptr"), values) | {"scale": "fp32"}
        sizes = {"k_token": problem.k, "v_token": problem.k}
        options = host.share_options(problem.k, problem.k, problem.n, problem.dtype)
        launch = Launch(Choice("share"), host.share_kernel, types, sizes, *options)
    plain = {parameter.name for parameter in launch.function.params if parameter.do_not_specialize}
    launch.sizes |= dict.fromkeys(plain, 1)
    return launch


_BUILDERS: dict[str, Callable[[Case, Device], Launch]] = {
    "weight_only_linear": _weight_only,
    "dequantize": _dequantize,
    "low_bit_linear": _low_bit,
    "quantize_activations": _quantize,
    "hadamard": _hadamard,
    "hadamard_quantize": _hadamard,
    "rms_norm": _elementwise,
    "silu_mul": _elementwise,
    "rotary": _elementwise,
    "decode_attention": _decode_attention,
}
