"""Kernels against their physical floors and the best public kernels: `python -m benchmarks kernels`."""
