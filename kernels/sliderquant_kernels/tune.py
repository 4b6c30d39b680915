"""`python -m sliderquant_kernels.tune`, by its short name: see `tools.tune`."""

from .tools.tune import main

if __name__ == "__main__":
    main()
