"""What follows when a kernel family failed `smoke`: which later phases, tests and rows are left out."""

from __future__ import annotations

from typing import Any

from .state import State

__all__ = [
    "GOAL_OPS",
    "TEST_FILES",
    "compiled",
    "failed",
    "families_of",
    "is_left_out",
    "reason_to_skip",
    "skipped_ops",
]

# The tests that need a GPU, and the families without which a file tells nothing.
TEST_FILES = {
    "tests/sliderquant_kernels/weight_only/test_gpu.py": ("weight_only_linear",),
    "tests/sliderquant_kernels/low_bit/test_gpu.py": ("low_bit_linear", "quantize_activations"),
    "tests/sliderquant_kernels/rotation/test_gpu.py": ("hadamard",),
    "tests/sliderquant_kernels/common/test_gpu_launches.py": ("graphs",),
    "tests/sliderquant_kernels/elementwise/test_op.py": ("elementwise",),
    "tests/sliderquant_kernels/attention/test_op.py": ("decode_attention",),
    "tests/decoding/test_gpu_decoding.py": ("graphs", "elementwise", "decode_attention"),
    # Of these files the others need none.
    "tests/modules/test_linear.py::test_a_move_to_a_gpu_packs_again": ("weight_only_linear", "low_bit_linear"),
    "tests/checkpoint/test_loaded_models.py::test_load_on_a_gpu": ("weight_only_linear",),
}
# What a phase launches, with the width that it does it at.
_LAUNCHED: dict[str, tuple[tuple[str, int | None], ...]] = {
    "tune": (("weight_only_linear", 4),),
    "retime": (("weight_only_linear", 4),),
    "sanitizer": (("weight_only_linear", 4),),
    "decode": (
        ("weight_only_linear", 4),
        ("elementwise", None),
        ("decode_attention", None),
        ("graphs", None),
    ),
}
# What `goals` times.
GOAL_OPS = ("weight_only_linear", "low_bit_linear")

Widths = set[int | None]


def families_of(test: str) -> tuple[str, ...]:
    """The families that a test, by its id, is about."""
    return next((families for name, families in TEST_FILES.items() if test.startswith(name)), ())


def failed(state: State) -> dict[str, Widths]:
    """The widths at which a family failed; None stands for all of them."""
    found: dict[str, Widths] = {}
    for row in state.rows("smoke"):
        if row["status"] in ("wrong", "error"):
            found.setdefault(row["family"], set()).add(row["bits"])
    return found


def is_left_out(broken: dict[str, Widths], family: str, bits: int | None) -> bool:
    """Whether a family is not to be launched at a width; None: at any width."""
    widths = broken.get(family, set())
    return None in widths or bits in widths


def reason_to_skip(phase: str, state: State) -> str | None:
    """Why there is no use in a phase; None: there is."""
    broken = failed(state)
    for family, bits in _LAUNCHED.get(phase, ()):
        if is_left_out(broken, family, bits):
            return f"{family}{f' at {bits} bits' if bits else ''} failed smoke"
    if phase == "goals" and all(skipped_ops(state).get(op) == [] for op in GOAL_OPS):
        return "no kernel that it times passed smoke"
    if phase == "retime" and state.outcome("tune").status == "skipped":
        return "nothing was tuned"
    return None


def skipped_ops(state: State) -> dict[str, list[int]]:
    """The ops that `goals` is not to launch, and the widths; no widths: none at all."""
    broken = failed(state)
    return {
        op: [] if None in broken[op] else sorted(bits for bits in broken[op] if bits is not None)
        for op in GOAL_OPS
        if op in broken
    }


def compiled(state: State) -> bool:
    """Whether the kernels came compiled, in a cache that fits this machine."""
    found: list[dict[str, Any]] = [row for row in state.rows("env") if row["key"] == "cache"]
    return bool(found) and bool(found[-1]["hit"])
