"""Which rows each subset consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from sliderquant_kernels.low_bit import tiles as low_bit_tiles

from ...harness import shapes
from ...harness.case import Case, Plan, Task, timings
from ...harness.shapes import CHECK_SHAPE, CPU_LAYERS, ODD_SHAPE, QUICK_LAYERS, TINY_LAYERS, TOKENS, Layer
from ...harness.shapes import subsets as subsets
from ...shared.schemes import HADAMARD, RESIDUAL, RMS_NORM, SILU_MUL, LowBitScheme, fused_before
from . import humming
from .providers import CHOSEN, CUBLAS, PROVIDERS, UNFUSED, accepts, name_of

__all__ = ["MAIN_SCHEME", "NAME", "plan", "steps_before", "subsets"]

NAME = "low_bit_linear"
MAIN_SCHEME = "W4A4"
OTHER_SCHEMES = ("W4A8", "W8A8", "W2A8", "W4A4-sym", "W4A4-sym-act-sym", "W8A8-sym-act-sym", "W4A4-g128")
# Where few variants, dtypes and zero-points could be wrong together.
CHECK_SCHEMES = ("W4A4", "W4A8-sym-act-sym", "W8A8-sym", "W2A8-act-sym")
GROUPED_CHECKS = ("W4A4-g128", "W8A8-g64-sym-act-sym", "W2A8-g32-act-sym")
FUSED_CHECKS = (
    "W4A4+rms_norm", "W4A8-act-sym+rms_norm", "W4A4+silu_mul", "W8A8-act-sym+silu_mul",
    "W4A4+silu_mul+hadamard+residual", "W8A8-act-sym+silu_mul+hadamard", "W4A4-g128+residual",
)  # fmt: skip
# Measured with all that stands before a layer, too.
CHAIN_SCHEMES = (MAIN_SCHEME, "W4A8", "W8A8")
# What a rotation comes before. `QUICK_LAYERS` has the one whose rotation takes two launches.
ROTATED_LAYERS = (Layer("llama-3-8b down", 4096, 14336), Layer("qwen2.5-7b down", 3584, 18944))
CHECK_TOKENS = {"warp_k": 3, "rows": 100, "tiles": 200}


def steps_before(layer: Layer) -> list[str]:
    """What may stand before a layer, as schemes end: what stands there in a decoder, and before down also with a
    rotation, which cannot be folded into weights."""
    fused = fused_before(layer)
    if fused is None:
        return []
    return [f"+{fused}", *([f"+{fused}+{HADAMARD}"] if fused == SILU_MUL else [])]


def plan(subset: str, device: str) -> Plan:
    """The rows of a subset, most important first. Raises ValueError for a subset that the device does not have."""
    if subset not in subsets(device):
        raise ValueError(f"subset: expected one of {', '.join(subsets(device))} on {device}, got {subset!r}")
    if subset == "tiny":
        rotated = f"{MAIN_SCHEME}+{SILU_MUL}+{HADAMARD}+{RESIDUAL}"
        schemes = (MAIN_SCHEME, f"{MAIN_SCHEME}+{RMS_NORM}", f"W4A8+{SILU_MUL}", rotated)
        return Plan([], list(timings(_cases(TINY_LAYERS, (1, 4), schemes), PROVIDERS, device)))
    if subset == "quick" and device == "cpu":
        layers = [*CPU_LAYERS, Layer("llama-3-8b qkv", 6144, 4096)]
        cases = _fused_cases(layers, (1, 64)) + _cases(CPU_LAYERS[:1], (1, 64), CHAIN_SCHEMES)
        rotated = f"+{SILU_MUL}+{HADAMARD}+{RESIDUAL}"
        cases += _cases(CPU_LAYERS[1:], (1, 64), [f"{scheme}{rotated}" for scheme in CHAIN_SCHEMES])
        return Plan(list(_checks(device)), list(timings(cases, PROVIDERS, device)))
    if subset == "quick":
        return Plan(list(_checks(device)), list(_quick_timings()))
    every = shapes.unique(shapes.every_layer())
    if subset == "decode":
        cases = _main_cases(every, [m for m in TOKENS if m <= 64])
    elif subset == "prefill":
        cases = _main_cases(every, [m for m in TOKENS if m > 64])
    elif subset == "schemes":
        cases = _other_schemes()
    else:
        cases = _main_cases(every, TOKENS) + _other_schemes()
    return Plan(list(_checks(device)), list(timings(cases, PROVIDERS, device)))


def _main_cases(layers: Sequence[Layer], tokens: Sequence[int]) -> list[Case]:
    """Every layer after what stands before it in a decoder, and alone."""
    return _cases(layers, tokens, (MAIN_SCHEME,)) + _fused_cases(layers, tokens)


def _other_schemes() -> list[Case]:
    merged = shapes.layers("llama-3-8b", single=False)
    chains = [layer for name in ("llama-3-8b", "qwen2.5-7b") for layer in shapes.layers(name, single=False)]
    return [
        *_cases(merged, TOKENS, OTHER_SCHEMES),
        *_cases(merged, TOKENS, (MAIN_SCHEME,), "fp16"),
        *(case for scheme in CHAIN_SCHEMES[1:] for case in _fused_cases(chains, TOKENS, scheme)),
    ]


def _cases(layers: Sequence[Layer], tokens: Iterable[int], schemes: Iterable[str], dtype: str = "bf16") -> list[Case]:
    """Cases that share operands stand next to each other."""
    return [
        Case(NAME, layer.name, (layer.n, layer.k), m, scheme, dtype)
        for scheme, layer, m in product(schemes, layers, tuple(tokens))
    ]


def _fused_cases(layers: Sequence[Layer], tokens: Sequence[int], scheme: str = MAIN_SCHEME) -> list[Case]:
    return [
        case
        for layer in layers
        for steps in steps_before(layer)
        for case in _cases((layer,), tokens, (f"{scheme}{steps}",))
    ]


def _quick_timings() -> Iterator[Task]:
    """The goals' tokens first. Variants by name only for many tokens, where more than one is worth a try."""
    for tokens in ((1, 16, 2048, 4096), (2, 8)):
        for task in timings(_main_cases(QUICK_LAYERS, tokens), PROVIDERS, "cuda"):
            alone = not LowBitScheme.parse(task.case.scheme).steps
            if task.provider == humming.PROVIDER.name:
                wanted = alone and task.case.m in (1, 2048)  # Each is a long compilation.
            else:
                wanted = task.provider in (CHOSEN, CUBLAS, UNFUSED) or (alone and task.case.m >= 2048)
            if wanted:
                yield task
        if tokens[0] == 1:
            rotated = f"+{SILU_MUL}+{HADAMARD}+{RESIDUAL}"
            cases = _cases(ROTATED_LAYERS, tokens, (f"{MAIN_SCHEME}{rotated}",))
            yield from _of(timings(cases, PROVIDERS, "cuda"), CHOSEN, CUBLAS, UNFUSED)
            cases = _cases(QUICK_LAYERS[1:2], (1, 2048), ("W4A8", "W8A8", "W2A8", "W4A4-g128"))
            for scheme in CHAIN_SCHEMES[1:]:
                cases += _cases(QUICK_LAYERS[1:2], (1, 2048), (f"{scheme}+{RMS_NORM}",))
                cases += _cases(ROTATED_LAYERS[:1], (1, 2048), (f"{scheme}{rotated}",))
            yield from _of(timings(cases, PROVIDERS, "cuda"), CHOSEN, CUBLAS)


def _of(tasks: Iterable[Task], *providers: str) -> Iterator[Task]:
    return (task for task in tasks if task.provider in providers)


def _checks(device: str) -> Iterator[Task]:
    """Every variant x dtype x pair of widths; groups; an odd shape; what comes before quantizing."""
    for scheme, dtype in product((*CHECK_SCHEMES, *GROUPED_CHECKS), ("bf16", "fp16")):
        yield from _check_tasks(CHECK_SHAPE, scheme, dtype, device)
    for scheme in ("W4A4", "W4A8-g32"):
        yield from _check_tasks(ODD_SHAPE, scheme, "bf16", device)
    for scheme, dtype, name in product(FUSED_CHECKS, ("bf16", "fp16"), (CHOSEN, UNFUSED)):
        yield Task("check", Case(NAME, "check", CHECK_SHAPE, 100, scheme, dtype), name)


def _check_tasks(shape: tuple[int, int], scheme: str, dtype: str, device: str) -> Iterator[Task]:
    if device == "cpu":
        yield Task("check", Case(NAME, "check", shape, 100, scheme, dtype), CHOSEN)
        return
    for variant in low_bit_tiles.VARIANTS:
        case = Case(NAME, "check", shape, CHECK_TOKENS[variant], scheme, dtype)
        if accepts(case, variant) is None:
            yield Task("check", case, name_of(variant))
