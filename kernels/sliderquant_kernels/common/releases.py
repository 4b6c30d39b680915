"""Which release of Triton compiles the kernels, for the rules whose best tile does not compile well with all of them.

What `inspect` found, which compiles with whatever Triton is installed:

- 3.8 wants more registers than a thread has for 64 x 256 values of `rotation.kernels` on sm_100.
- 3.6 does not compile products with a first order of more than 64 (27648 = 108 * 256) for sm_100.
- Before 3.8 int8 products on sm_100 are plain IMMA and not tcgen05's: `tiles` of low-bit linears spills there and has
  nothing to gain.
- ptxas of 3.6 rather spills a register or two of some weight-only tiles than leave out a program. 3.7 was not compiled
  and is treated like it.
"""

from __future__ import annotations

from functools import lru_cache

_NEWEST = (99, 0)


@lru_cache(maxsize=1)
def triton_release() -> tuple[int, int]:
    """Such as (3, 9); the newest where there is no Triton, as nothing is compiled there."""
    try:
        import triton

        major, minor = triton.__version__.split(".")[:2]
        return int(major), int(minor)
    except (ImportError, ValueError):
        return _NEWEST
