"""`python -m sliderquant_kernels.estimate`, by its short name: see `tools.estimate`."""

from .tools.estimate import main

if __name__ == "__main__":
    main()
