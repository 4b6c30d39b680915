"""Triton's compiled kernels in one file, for a machine where minutes count."""
