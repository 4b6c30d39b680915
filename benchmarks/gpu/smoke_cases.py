"""One launch of every kernel family at every width, with what fp64 says it must return."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sliderquant_kernels import LowBitLayout, QuantizedActivations, WeightLayout, factor_hadamard, reference
from sliderquant_kernels.common.choices import Choice
from sliderquant_kernels.common.launch_plan import PlanCache
from sliderquant_kernels.tools.tune_measure import chosen

__all__ = ["CASES", "Case", "Check"]

# Outputs, inputs and tokens of the linears; in the interpreter a quarter of the outputs and an eighth of the inputs.
N, K, M = 512, 4096, 16
WIDTHS, LOW_BIT_WIDTHS = (2, 3, 4, 8), (2, 4, 8)
# Relative error of a result in bf16: its own rounding, twice for what is rounded on the way. Triton's interpreter
# truncates where a GPU rounds, which is one more.
TOLERANCE = 2 * 2.0**-8
DTYPE = torch.bfloat16


class Check(NamedTuple):
    """A launch, and what it must return.

    call: launches, and returns what the kernel wrote: it is called several times, and must return the same bits.
    compared: of that, the values `want` speaks of.
    want: fp64.
    note: which tile it was.
    """

    call: Callable[[], Any]
    compared: Callable[[Any], Tensor]
    want: Tensor
    tolerance: float = TOLERANCE
    note: str = ""


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        family: whose later phases are left out when it fails.
        bits: of the weight, or of the activations; None: no width matters.
        make: device -> Check; raises NotImplementedError for what a CPU cannot do.
    """

    family: str
    name: str
    bits: int | None
    make: Callable[[torch.device], Check]

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return " ".join([self.family, self.name, *([f"W{self.bits}"] if self.bits else [])])


def _sizes(device: torch.device) -> tuple[int, int]:
    return (N, K) if device.type == "cuda" else (N // 8, K // 8)


def _random(device: torch.device, *shape: int, seed: int = 1, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _weight(device: torch.device, bits: int, n: int, k: int, groups: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes uint8 `[n, k]`, scales `[n, groups]`, zero-points uint8 or None."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).mul_(0.02).to(DTYPE)
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return tuple(None if part is None else part.to(device) for part in (codes, scale, zero))


def _weight_only(bits: int, variant: str | None, choice: Choice | None, invariant: bool = False) -> Callable:
    def make(device: torch.device) -> Check:
        from sliderquant_kernels.weight_only import launch

        n, k = _sizes(device)
        layout = WeightLayout("triton", bits, n, k, 128, False)
        weight = _weight(device, bits, n, k, k // 128, False)
        packed, x = layout.pack(*weight), _random(device, M, k)

        plans = PlanCache()  # which keep what is chosen at the first call

        def call() -> Tensor:
            with nullcontext() if choice is None else chosen(choice):
                return launch.weight_only_linear(x, *packed[:2], None, None, layout, variant, invariant, plans)

        rules = launch.choose(launch.problem_of(layout, M, DTYPE), launch.device_of(x), variant, invariant)
        return Check(call, lambda y: y, reference.weight_only_linear(x, *weight, bits), note=str(choice or rules))

    return make


def _low_bit(bits: int, variant: str) -> Callable:
    def make(device: torch.device) -> Check:
        from sliderquant_kernels.low_bit import launch

        n, k = _sizes(device)
        layout = LowBitLayout("triton_int8", bits, n, k, None, False)
        weight = _weight(device, bits, n, k, 1, False)
        packed = layout.pack(*weight)
        codes = torch.randint(-8, 8, (M, k), dtype=torch.int8, generator=torch.Generator().manual_seed(3)).to(device)
        scale = (torch.rand(M, generator=torch.Generator().manual_seed(4)) * 0.02 + 0.001).to(device)
        zero = torch.arange(M, dtype=torch.int32, device=device) % 5 - 2
        x = QuantizedActivations(codes, scale, zero, codes.int().sum(1).int())

        def call() -> Tensor:
            return launch.low_bit_linear(*x, *packed, None, None, layout, DTYPE, variant)

        return Check(call, lambda y: y, reference.weight_only_linear(x.dequantize(torch.float64), *weight, bits))

    return make


def _steps(found: tuple[Tensor, ...]) -> Tensor:
    """What codes say, in fp64."""
    codes, scale, zero = found[0].double(), found[1].double(), found[2]
    return (codes - (0.0 if zero is None else zero.double().unsqueeze(-1))) * scale.unsqueeze(-1)


def _codes_tolerance(bits: int, lost: float, count: int) -> float:
    """Relative error of `count` values on a grid when what they were before may be off by `lost`, relative to itself.

    A code changes where the value was within its error e of the middle of two codes: with probability e / s for steps
    of s, by s, so that the mean square is e s. Normal values have a mean magnitude of 0.8 and a range of about 7. Where
    that means fewer than one code, there may be four.
    """
    step = 7 / (2**bits - 1)
    return (lost * 0.8 * step + 4 * step**2 / count) ** 0.5


def _quantize(bits: int, before: str) -> Callable:
    def make(device: torch.device) -> Check:
        from sliderquant_kernels.activations import kernels as launch

        k = _sizes(device)[1]
        x, gate, norm = _random(device, M, k), _random(device, M, k, seed=2), _random(device, k, seed=5).abs()
        value = x
        if before == "rms_norm":
            value = torch.nn.functional.rms_norm(x.double(), (k,), norm.double(), 1e-6)
        elif before == "silu_mul":
            value = torch.nn.functional.silu(gate.double()) * x.double()
        codes, scale, zero = reference.quantize_activations(value, bits, False)

        def call() -> tuple[Tensor, ...]:
            return launch.quantize_activations(
                x, bits, False, norm if before == "rms_norm" else None, 1e-6, gate if before == "silu_mul" else None,
                False,
            )  # fmt: skip

        want = (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        # The norm and the activation round to bf16 twice; a quotient by the scale errs by a few roundings of fp32.
        lost = 2.0**-19 if before == "plain" else 2 * TOLERANCE
        return Check(call, _steps, want, _codes_tolerance(bits, lost, M * k))

    return make


# Sizes whose rotation takes several rows at a time, one row, and two launches.
_ROTATIONS = {"rows": 64, "row": 1024, "leading": 4816, "quantized": 1024}


def _hadamard(name: str) -> Callable:
    def make(device: torch.device) -> Check:
        from sliderquant_kernels.rotation import launch

        n = _ROTATIONS[name]
        # The interpreter goes token by token through thousands of columns.
        tokens = M if device.type == "cuda" else 2
        transform, x = factor_hadamard(n), _random(device, tokens, n)
        want = reference.hadamard(x, transform)
        if name != "quantized":
            # Between two launches it is rounded once more.
            launches = 2 if name == "leading" else 1
            return Check(lambda: launch.hadamard(x, None, transform, False), lambda y: y, want, launches * TOLERANCE)
        codes, scale, zero = reference.quantize_activations(want, 4, False)
        want = (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        tolerance = _codes_tolerance(4, 2.0**-15, tokens * n)
        return Check(lambda: launch.hadamard_quantize(x, None, None, transform, 4, False), _steps, want, tolerance)

    return make


def _elementwise(name: str) -> Callable:
    def make(device: torch.device) -> Check:
        from sliderquant_kernels.elementwise import kernels as launch

        x, other = _random(device, M, 1000), _random(device, M, 1000, seed=2)
        if name == "rms_norm":
            want = torch.nn.functional.rms_norm(x.double(), (1000,), other[0].double(), 1e-6)
            return Check(lambda: launch.rms_norm(x, other[0], 1e-6), lambda y: y, want)
        if name == "silu_mul":
            want = torch.nn.functional.silu(x.double()) * other.double()
            return Check(lambda: launch.silu_mul(x, other), lambda y: y, want)
        q, k = _random(device, 2, 4, 3, 64), _random(device, 2, 2, 3, 64, seed=2)
        cos, sin = _random(device, 2, 3, 64, seed=3), _random(device, 2, 3, 64, seed=4)
        turned = [torch.cat([-t[..., 32:], t[..., :32]], -1).double() for t in (q, k)]
        wanted = [t.double() * cos.double().unsqueeze(1) + r * sin.double().unsqueeze(1)
                  for t, r in zip((q, k), turned, strict=True)]  # fmt: skip
        joined = torch.cat([t.flatten() for t in wanted])
        return Check(
            lambda: launch.rotary(q, k, cos, sin), lambda found: torch.cat([t.flatten() for t in found]), joined
        )

    return make


def _attention(device: torch.device) -> Check:
    from sliderquant_kernels.attention import kernels as launch

    length, capacity = 300, 512
    q, keys, values = (_random(device, 2, heads, size, 64, seed=seed)
                       for heads, size, seed in ((8, 1, 1), (2, capacity, 2), (2, capacity, 3)))  # fmt: skip
    index = torch.tensor([length - 1], device=device)
    wide = [t[:, :, :length].double().repeat_interleave(4, 1) for t in (keys, values)]
    want = ((q.double() @ wide[0].mT / 8).softmax(-1) @ wide[1]).transpose(1, 2)
    return Check(lambda: launch.decode_attention(q, keys, values, index, None, 0.125), lambda y: y, want, 2 * TOLERANCE)


def _in_graphs(device: torch.device, capture: Callable[[Callable[[Tensor], Tensor], Tensor], Callable]) -> Check:
    """A split linear, then a rotation of two launches, replayed."""
    from sliderquant_kernels import hadamard, weight_only_linear

    if device.type != "cuda":
        raise NotImplementedError("graphs are of a GPU")
    n, k = _ROTATIONS["leading"], K
    layout = WeightLayout("triton", 4, n, k, 128, False)
    weight = _weight(device, 4, n, k, k // 128, False)
    packed, x, transform = layout.pack(*weight), _random(device, M, k), factor_hadamard(n)

    def step(x: Tensor) -> Tensor:
        return hadamard(weight_only_linear(x, packed, layout, variant="warp_k"), transform)

    want = reference.hadamard(reference.weight_only_linear(x, *weight, 4), transform)
    return Check(capture(step, x), lambda y: y, want, 2 * TOLERANCE)


def _cuda_graph(device: torch.device) -> Check:
    def capture(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        step(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(x)

        def replay() -> Tensor:
            y.fill_(float("nan"))
            graph.replay()
            return y.clone()

        return replay

    return _in_graphs(device, capture)


def _reduce_overhead(device: torch.device) -> Check:
    def capture(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

        def replay() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x).clone()

        return replay

    return _in_graphs(device, capture)


def _all() -> Iterator[Case]:
    # What takes longest comes first.
    # A family of its own: what torch.compile cannot do, or not in time, decoding does not need.
    yield Case("torch.compile", "reduce-overhead", None, _reduce_overhead)
    yield Case("graphs", "CUDA graph", None, _cuda_graph)
    for bits in WIDTHS:
        for variant in ("warp_k", "rows", "dense"):
            yield Case("weight_only_linear", variant, bits, _weight_only(bits, variant, None))
        split = Choice("warp_k", 16, 2, 4, 3, 2)
        yield Case("weight_only_linear", "split", bits, _weight_only(bits, "warp_k", split))
        yield Case("weight_only_linear", "batch_invariant", bits, _weight_only(bits, None, None, invariant=True))
    for bits, variant in itertools.product(LOW_BIT_WIDTHS, ("warp_k", "rows", "tiles")):
        yield Case("low_bit_linear", variant, bits, _low_bit(bits, variant))
    for bits, before in itertools.product((4, 8), ("plain", "rms_norm", "silu_mul")):
        yield Case("quantize_activations", before, bits, _quantize(bits, before))
    for name in _ROTATIONS:
        yield Case("hadamard", name, None, _hadamard(name))
    for name in ("rms_norm", "silu_mul", "rotary"):
        yield Case("elementwise", name, None, _elementwise(name))
    yield Case("decode_attention", "shares", None, _attention)


CASES = {case.key: case for case in _all()}
