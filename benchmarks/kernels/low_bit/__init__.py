"""Low-bit activations: the linear that quantizes its input, end to end, and the quantizing alone."""
