"""Linears with weights of 2, 3, 4 or 8 bits and 16-bit activations."""
