"""What a launch of each op comes down to: the kernel, the types of its arguments, its constants.

For compiling it without a GPU; everything is taken from where the launch itself takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..common.choices import Choice, Device
from ..common.compiling import POINTERS, Launch
from ..low_bit import fragments as int8_fragments
from ..low_bit.layout import LowBitLayout
from ..low_bit.tiles import choose_low_bit
from ..rotation.matrix import factor_hadamard
from ..rotation.tiles import choose_hadamard
from ..weight_only import tiles
from ..weight_only.fragments import block_bytes, weight_shape
from ..weight_only.layout import WeightLayout
from .problems import Case

_CLIP = {"clip_low": "fp32", "clip_high": "fp32"}


def describe_launch(case: Case, arch: int, choice: Choice | None = None) -> Launch:
    """The launch of a case on the device that stands for an architecture; with `choice`, for a weight-only linear
    alone, by that tile instead of the one that the rules choose."""
    device = Device.typical(arch)
    return _BUILDERS[case.op](case, device) if choice is None else _weight_only(case, device, choice)


def _weight_only(case: Case, device: Device, choice: Choice | None = None) -> Launch:
    from ..weight_only import kernels
    from ..weight_only import launch as host

    problem, values = case.problem, POINTERS[case.problem.dtype]
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
    from ..weight_only import kernels
    from ..weight_only import launch as host

    problem, values = case.problem, POINTERS[case.problem.dtype]
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
    from ..low_bit import kernels
    from ..low_bit import launch as host

    problem = case.problem
    layout = LowBitLayout("triton_int8", problem.bits, problem.n, problem.k, problem.group_size, problem.symmetric)
    m = max(problem.m, host.FEWEST_TOKENS)
    choice = choose_low_bit(m, problem.n, problem.k, problem.bits, problem.group_size, device, case.variant)
    types = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "x_sum_ptr": "*i32", "scale_ptr": "*fp32",
             "constant_ptr": "*i32", "y_ptr": POINTERS[problem.dtype]}  # fmt: skip
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
    from ..activations import kernels as host

    problem, values = case.problem, POINTERS[case.problem.dtype]
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
    from ..rotation import axis_kernels as axis
    from ..rotation import kernels
    from ..rotation import launch as host

    problem, values = case.problem, POINTERS[case.problem.dtype]
    transform = factor_hadamard(problem.k)
    chosen = choose_hadamard(transform.orders, device, problem.dtype, case.variant in (None, "clipped", "second"))
    if chosen.variant == "matmul":
        return Launch(Choice("matmul"))
    # The first of two launches does not quantize.
    bits = 0 if chosen.leading > 1 and case.variant != "second" else problem.bits
    operand = POINTERS[host.x_operand(problem.dtype)]
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
    types["right_ptr"] = POINTERS[host.part_operand()]
    constants |= host.row_constants(chosen, problem.dtype)
    elements = problem.k // chosen.leading
    return Launch(
        tile, kernels.row_kernel, types, {"M": 4096}, constants, host.row_options(chosen), elements=elements
    )  # fmt: skip


def _elementwise(case: Case, device: Device) -> Launch:
    from ..elementwise import kernels as host

    k, values = case.problem.k, POINTERS[case.problem.dtype]
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
    from ..attention import kernels as host

    problem, values = case.problem, POINTERS[case.problem.dtype]
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
