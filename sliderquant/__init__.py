"""SliderQuant: quantize a language model to 2, 3, 4 or 8 bits, and run it."""

from sliderquant._version import __version__

__all__ = ["__version__"]
