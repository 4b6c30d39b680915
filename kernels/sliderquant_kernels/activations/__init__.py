"""Activations rounded to codes, token by token."""
