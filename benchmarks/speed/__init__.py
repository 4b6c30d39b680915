"""Seconds of what surrounds the kernels: loading, learning steps, tokens, calls on the host."""
