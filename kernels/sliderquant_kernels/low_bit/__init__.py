"""Linears whose activations are rounded to 4 or 8 bits as well."""
