"""`python -m benchmarks.gpu.split_launch`: one launch whose tiles several programs share, for compute-sanitizer.

The programs of a tile add their parts through memory, in a fixed order that a counter keeps.
"""

from __future__ import annotations

import torch

from .smoke_cases import CASES

__all__ = ["main"]

CASE = "weight_only_linear split W4"


def main() -> None:
    """Launch, and compare with fp64."""
    check = CASES[CASE].make(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    got = check.compared(check.call()).double()
    error = float((got - check.want).norm() / check.want.norm())
    print(f"{CASE}: relative error {error:.1e} of {check.tolerance:.1e}")
    if not error <= check.tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
