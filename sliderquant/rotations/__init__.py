"""Orthogonal changes of basis, and their folding into weights."""
