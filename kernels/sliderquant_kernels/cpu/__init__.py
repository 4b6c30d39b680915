"""Compiled loops and torch's containers for CPUs, which several ops multiply with."""
