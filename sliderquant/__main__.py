"""`python -m sliderquant`: the command line where no script is on the path."""

from sliderquant.cli import main

main()
