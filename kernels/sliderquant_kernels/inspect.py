"""`python -m sliderquant_kernels.inspect`, by its short name: see `tools.inspect`."""

from .tools.inspect import main

if __name__ == "__main__":
    raise SystemExit(main())
