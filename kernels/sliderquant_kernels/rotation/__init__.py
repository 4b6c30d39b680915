"""Hadamard transforms of activations."""
