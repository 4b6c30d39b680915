"""Low-bit linear operators."""
