"""Launches that skip Triton's host code: what reaches the compiled kernel, and when the JIT has to be asked again."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from sliderquant_kernels import LowBitLayout, WeightLayout, factor_hadamard
from sliderquant_kernels.activations import kernels as activations_triton
from sliderquant_kernels.common import devices, launch_plan
from sliderquant_kernels.common.choices import Choice, Device
from sliderquant_kernels.cpu.vnni import Rounding
from sliderquant_kernels.low_bit import kernels as low_bit_triton
from sliderquant_kernels.low_bit import launch as low_bit_launch
from sliderquant_kernels.rotation import axis_kernels as hadamard_axis_triton
from sliderquant_kernels.rotation import launch as hadamard_launch
from sliderquant_kernels.weight_only import kernels as matmul_triton
from sliderquant_kernels.weight_only import launch as weight_only_triton


class _Run:
    """A compiled kernel's `run` as in Triton 3.8 and 3.9."""

    def __init__(self, log):
        self.log = log

    def __call__(self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
                 launch_exit_hook, *args):  # fmt: skip
        assert (stream, function, kernel_metadata) == (77, 5, "metadata")
        assert launch_metadata is launch_enter_hook is launch_exit_hook is None
        self.log.append(((gridX, gridY, gridZ), args))


class _ShortRun(_Run):
    """As in Triton 3.4 to 3.7."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        super().__call__(gridX, gridY, gridZ, stream, function, *args)


class _Kernel(JITFunction):
    """A kernel whose JIT writes down what it is launched with; `launched` says what went directly."""

    def __init__(self, function, run=_Run, **options):
        super().__init__(function, **options)
        self.jitted, self.launched, self.made = [], [], 0
        self.compiled = SimpleNamespace(run=run(self.launched), function=5, packed_metadata="metadata")

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.jitted.append((grid, args, kwargs))
            return self.compiled

        return launch

    def warmup(self, *args, grid, **kwargs):
        self.made += 1
        return self.compiled


def _simple(x_ptr, y_ptr, M, N, A, B):
    pass


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """The device that tensors on the CPU are on is the current one; returns what tests change."""
    state = SimpleNamespace(current=-1)
    monkeypatch.setattr(devices, "current_device", lambda: state.current)
    monkeypatch.setattr(devices, "raw_stream", lambda index: 77)
    for plans in (launch_plan._launchers, weight_only_triton._plans, weight_only_triton._dequantize_plans,
                  low_bit_launch._plans, low_bit_launch._expand_plans, activations_triton._plans,
                  hadamard_launch._plans):  # fmt: skip
        plans.clear()
    return state


@pytest.fixture
def made():
    """`made(run)`: a kernel and its launcher, launched once through the JIT."""

    def make(run=_Run):
        kernel = _Kernel(_simple, run)
        launcher = launch_plan.Launcher(kernel, {"B": 9, "A": 8}, {"num_warps": 4}, -1)
        launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
        return kernel, launcher

    return make


@pytest.mark.parametrize("run", [_Run, _ShortRun])
def test_the_second_launch_is_direct(made, run):
    kernel, launcher = made(run)
    assert kernel.jitted[0][2] == {"A": 8, "B": 9, "num_warps": 4}
    assert not kernel.launched
    x = torch.zeros(4)
    launcher((6, 2, 1), (x, None), (3, 4))
    assert len(kernel.jitted) == 1
    assert kernel.launched == [((6, 2, 1), (x.data_ptr(), None, 3, 4, 8, 9))]


def test_addresses_that_are_no_multiples_go_to_the_jit(made):
    kernel, launcher = made()
    launcher((2, 1, 1), (torch.zeros(5)[1:], None), (3, 4))
    assert (len(kernel.jitted), len(kernel.launched)) == (2, 0)
    fresh = launch_plan.Launcher(kernel, {"A": 8, "B": 9}, {}, -1)
    # What was compiled for such an address is not kept.
    fresh((2, 1, 1), (torch.zeros(5)[1:], None), (3, 4))
    fresh((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert (len(kernel.jitted), len(kernel.launched)) == (4, 0)
    fresh((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert (len(kernel.jitted), len(kernel.launched)) == (4, 1)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_go_to_the_jit(made, monkeypatch, name):
    kernel, launcher = made()
    for hook, direct in ((None, 1), (SimpleNamespace(calls=[]), 2), (SimpleNamespace(calls=[print]), 2), (print, 2)):
        monkeypatch.setattr(launch_plan._runtime, name, hook)
        launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
        assert len(kernel.launched) == direct
    kernel.pre_run_hooks.append(print)
    monkeypatch.setattr(launch_plan._runtime, name, None)
    launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert len(kernel.launched) == 2


def test_another_current_device_goes_to_the_jit(made, device):
    kernel, launcher = made()
    device.current = 1
    launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert (len(kernel.jitted), len(kernel.launched)) == (2, 0)


class _OtherRun:
    def __call__(self, grid, stream, function, *args):
        raise AssertionError("called with arguments that it does not take")


class _MoreArguments(_Run):
    def __call__(self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
                 launch_exit_hook, cluster, *args):  # fmt: skip
        raise AssertionError("called with arguments that it does not take")


@pytest.mark.parametrize("change", ["run", "more", "function", "packed_metadata", "nothing", "release"])
def test_releases_of_triton_that_are_not_known_go_to_the_jit(monkeypatch, change):
    kernel = _Kernel(_simple, _ShortRun if change == "release" else _Run)
    if change == "run":
        kernel.compiled.run = _OtherRun()
    elif change == "more":
        kernel.compiled.run = _MoreArguments([])
    elif change == "nothing":
        kernel.compiled = None
    elif change == "release":
        monkeypatch.setattr(triton, "__version__", "4.0.0")
    else:
        delattr(kernel.compiled, change)
    launcher = launch_plan.Launcher(kernel, {"A": 8, "B": 9}, {}, -1)
    for _ in range(3):
        launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert len(kernel.jitted) == 3


def test_interpreted_kernels_always_run():
    calls = []
    kernel = SimpleNamespace(arg_names=["x"])
    interpreted = type("Interpreted", (), {"__getitem__": lambda self, grid: lambda *a, **k: calls.append((grid, a))})()
    assert not isinstance(kernel, JITFunction)
    launcher = launch_plan.Launcher(interpreted, {}, {}, -1)
    for _ in range(2):
        launcher((1, 1, 1), (torch.zeros(1),), ())
    assert len(calls) == 2


def test_prepare_compiles_and_does_not_launch():
    kernel = _Kernel(_simple)
    launcher = launch_plan.Launcher(kernel, {"A": 8, "B": 9}, {}, -1)
    assert launcher.prepare((torch.float32, None), (3, 4))
    assert launcher.prepare((torch.float32, None), (3, 4))
    assert (kernel.made, len(kernel.jitted), len(kernel.launched)) == (1, 0, 0)
    launcher((2, 1, 1), (torch.zeros(4), None), (3, 4))
    assert (len(kernel.jitted), len(kernel.launched)) == (0, 1)


def test_what_a_launcher_depends_on():
    kernel = _Kernel(_simple, do_not_specialize=["M"])

    def found(constants=None, options=None, index=-1, dtypes=(torch.float16, None), numbers=(3, 4)):
        given = {"A": 8, "B": 9} if constants is None else constants
        return launch_plan.launcher_for(kernel, given, options or {}, index, dtypes, numbers)

    assert found() is found()
    assert found() is found(numbers=(5, 4))  # M is not specialized for
    for other in (
        found({"A": 8, "B": 7}), found(options={"num_warps": 8}), found(index=1), found(dtypes=(torch.bfloat16, None)),
        found(dtypes=(torch.float16, torch.float16)), found(numbers=(3, 5)), found(numbers=(2**31, 4)),
        found(numbers=(3, None)), found(numbers=(3, 0.5)),
    ):  # fmt: skip
        assert other is not found()
    assert found(numbers=(3, 0.5)) is found(numbers=(3, 0.25))


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(launch_plan, "_MOST_PLANS", 3)
    plans = launch_plan.PlanCache()
    for key in range(10):
        assert plans.keep(key, str(key)) == str(key)
        assert len(plans) <= 3
    assert plans.get(9) == "9"


def _check(kernel, launch):
    """Both launches hand the kernel the same arguments; through the JIT by their names, directly by their places."""
    launch()
    assert (len(kernel.jitted), len(kernel.launched)) == (1, 0)
    launch()
    assert (len(kernel.jitted), len(kernel.launched)) == (1, 1)
    grid, args, kwargs = kernel.jitted[0]
    signature = inspect.signature(kernel.fn)
    bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k in signature.parameters}).arguments
    assert list(bound) == list(signature.parameters)
    direct_grid, direct = kernel.launched[0]
    assert direct_grid == grid
    assert len(direct) == len(bound)
    for name, got, want in zip(bound, direct, bound.values(), strict=True):
        if isinstance(want, torch.Tensor):
            assert isinstance(got, int)
            assert got % 16 == 0
        else:
            assert got == want, name
            assert type(got) is type(want), name
    return bound


def _replace(monkeypatch, module, name):
    kernel = _Kernel(getattr(module, name).fn)
    monkeypatch.setattr(module, name, kernel)
    return kernel


@pytest.mark.parametrize("variant", ["warp_k", "rows"])
@pytest.mark.parametrize("split", [1, 2])
def test_arguments_of_the_weight_only_kernels(monkeypatch, make_weight, make_x, variant, split):
    kernel = _replace(monkeypatch, matmul_triton, f"{variant}_kernel")
    monkeypatch.setattr(weight_only_triton, "choose", lambda *_: Choice(variant, 16, 2, 4, 3, split))
    layout = WeightLayout("triton", 4, 64, 512, 128, False)
    packed = layout.pack(*make_weight(4, 64, 512, 128, False, torch.float16)[:3])
    x, bias, residual = (make_x(shape, torch.float16) for shape in ((3, 512), (64,), (3, 64)))
    bound = _check(
        kernel,
        lambda: weight_only_triton.weight_only_linear(x, packed.weight, packed.scale, bias, residual, layout),
    )
    assert bound["x_ptr"] is x
    assert bound["bias_ptr"] is bias
    assert bound["residual_ptr"] is residual
    assert (bound["counter_ptr"] is None) == (split == 1)
    assert (bound["M"], bound["N"], bound["K"], bound["SPLIT"]) == (3, 64, 512, split)


def test_arguments_of_dequantize(monkeypatch, make_weight):
    kernel = _replace(monkeypatch, matmul_triton, "dequantize_kernel")
    layout = WeightLayout("triton", 3, 64, 512, None, True)
    packed = layout.pack(*make_weight(3, 64, 512, None, True, torch.float16)[:3])
    _check(kernel, lambda: weight_only_triton.dequantize(packed.weight, packed.scale, layout, torch.float16))


@pytest.mark.parametrize("variant", ["warp_k", "rows", "tiles", "expand"])
def test_arguments_of_the_low_bit_kernels(monkeypatch, make_weight, make_x, variant):
    layout = LowBitLayout("triton_int8", 4, 64, 256, None, False)
    packed = layout.pack(*make_weight(4, 64, 256, None, False, torch.float16)[:3])
    names = {"warp_k": "low_bit_warp_k_kernel", "rows": "low_bit_rows_kernel", "tiles": "int8_tiles_kernel"}
    if variant == "expand":
        kernel = _replace(monkeypatch, low_bit_triton, "expand_kernel")
        _check(kernel, lambda: low_bit_launch.expand(packed.weight, layout))
        return
    kernel = _replace(monkeypatch, low_bit_triton, names[variant])
    monkeypatch.setattr(low_bit_launch, "choose_low_bit", lambda *_: Choice(variant, 16, 2, 4, 3))
    codes = torch.zeros(3, 256, dtype=torch.int8)
    scale, zero = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    bias = make_x((64,), torch.float16)
    bound = _check(
        kernel,
        lambda: low_bit_launch.low_bit_linear(codes, scale, zero, zero, *packed, bias, None, layout, torch.float16),
    )
    assert bound["x_scale_ptr"] is scale
    assert bound["bias_ptr"] is bias


@pytest.mark.parametrize("clip", [None, (0.5, 0.75)])
def test_arguments_of_quantize(monkeypatch, make_x, clip):
    kernel = _replace(monkeypatch, activations_triton, "quantize_kernel")
    x, gate = make_x((5, 96), torch.bfloat16), make_x((5, 96), torch.bfloat16, 2)
    bound = _check(
        kernel,
        lambda: activations_triton.quantize_activations(x, 4, False, None, 1e-6, gate, True, clip),
    )
    assert bound["gate_ptr"] is gate
    assert (bound["clip_low"], bound["clip_high"]) == (clip or (None, None))


@pytest.mark.parametrize(
    ("n", "module", "name"),
    [
        (64, hadamard_axis_triton, "rows_kernel"),
        (4096, hadamard_launch, "row_kernel"),
        (28672, hadamard_axis_triton, "leading_kernel"),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_arguments_of_the_rotations(monkeypatch, make_x, n, module, name, inverse, bits):
    if bits and inverse:
        pytest.skip("nothing rounds what is rotated back")
    kernel = _replace(monkeypatch, module, name)
    if name == "leading_kernel":
        # The launch before it is of no interest here.
        monkeypatch.setattr(hadamard_launch, "row_kernel", _Kernel(hadamard_launch.row_kernel.fn))
    monkeypatch.setattr(hadamard_launch, "device_of", lambda _: Device.typical(90))
    transform, x, signs = factor_hadamard(n), make_x((3, n), torch.float16), torch.ones(n, dtype=torch.float16)
    if bits:
        bound = _check(
            kernel, lambda: hadamard_launch.hadamard_quantize(x, signs, None, transform, 4, False, (0.5, 1.0))
        )
        assert (bound["clip_low"], bound["clip_high"]) == (0.5, 1.0)
    else:
        bound = _check(kernel, lambda: hadamard_launch.hadamard(x, signs, transform, inverse))
        assert bound["clip_low"] is None
        if inverse:
            assert bound["after_ptr"] is signs
    assert bound["BITS"] == bits


def test_a_plan_of_one_number_of_tokens_serves_no_other(monkeypatch, make_weight, make_x):
    kernel = _replace(monkeypatch, matmul_triton, "rows_kernel")
    layout = WeightLayout("triton", 4, 64, 512, 128, True)
    packed = layout.pack(*make_weight(4, 64, 512, 128, True, torch.float16)[:3])
    for m in (3, 3, 40, 3, 40):
        x = make_x((m, 512), torch.float16)
        weight_only_triton.weight_only_linear(x, packed.weight, packed.scale, None, None, layout, "rows")
    numbers = [args[8] for _, args in kernel.launched]
    assert set(numbers) <= {3, 40}
    assert len(kernel.jitted) + len(kernel.launched) == 5
    grids = {args[8]: grid for grid, args in kernel.launched}
    assert grids.keys() == {3, 40}


@pytest.mark.parametrize("variant", ["warp_k", "dense"])
def test_a_prepared_product_is_launched_directly(monkeypatch, make_weight, make_x, variant):
    kernel = _replace(monkeypatch, matmul_triton, "dequantize_kernel" if variant == "dense" else "warp_k_kernel")
    monkeypatch.setattr(weight_only_triton, "choose", lambda *_: Choice(variant, 16, 2, 4, 3))
    layout = WeightLayout("triton", 4, 64, 512, 128, True)
    packed = layout.pack(*make_weight(4, 64, 512, 128, True, torch.float16)[:3])
    direct = weight_only_triton.DirectLinear(packed.weight, packed.scale, None, layout)
    assert direct.prepare(3)
    assert (kernel.made, kernel.jitted, kernel.launched) == (1, [], [])
    direct(make_x((3, 512), torch.float16))
    assert (len(kernel.jitted), len(kernel.launched)) == (0, 1)


@pytest.mark.parametrize("clip", [None, (0.5, 0.75)])
@pytest.mark.parametrize("variant", ["rows", "tiles"])
def test_a_prepared_low_bit_product_is_launched_directly(monkeypatch, make_weight, make_x, variant, clip):
    name = "int8_tiles_kernel" if variant == "tiles" else "low_bit_rows_kernel"
    launched = [
        _replace(monkeypatch, low_bit_triton, name),
        _replace(monkeypatch, activations_triton, "quantize_kernel"),
    ]
    if variant == "tiles":
        launched.append(_replace(monkeypatch, low_bit_triton, "expand_kernel"))
    monkeypatch.setattr(low_bit_launch, "choose_low_bit", lambda *_: Choice(variant, 16, 2, 4, 3))
    layout = LowBitLayout("triton_int8", 4, 64, 256, None, False)
    packed = layout.pack(*make_weight(4, 64, 256, None, False, torch.float16)[:3])
    direct = low_bit_launch.DirectLowBitLinear(packed, layout, torch.float16, None, Rounding(4, False, clip))
    assert direct.prepare(3)
    assert all((kernel.made, kernel.jitted, kernel.launched) == (1, [], []) for kernel in launched)
    direct(make_x((3, 256), torch.float16))
    assert [(len(kernel.jitted), len(kernel.launched)) for kernel in launched] == [(0, 1)] * len(launched)
