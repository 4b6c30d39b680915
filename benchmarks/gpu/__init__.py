"""One command that proves the package on a GPU."""
