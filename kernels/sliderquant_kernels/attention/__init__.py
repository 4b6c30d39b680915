"""Attention of one new token over a cache."""
