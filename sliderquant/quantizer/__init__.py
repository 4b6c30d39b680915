"""Grids of codes: found, searched, rounded to, and rounded to while learning."""
