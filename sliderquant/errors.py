"""What goes wrong through no fault of the program: each message names the input, what was expected and what to do."""

__all__ = ["CheckpointError", "InputError", "SliderQuantError"]


class SliderQuantError(Exception):
    """Base of every error that sliderquant raises on purpose. The command line prints it as one line, exit code 1."""


class InputError(SliderQuantError, ValueError):
    """An argument, option, configuration key or input file is not usable. Exit code 2 on the command line."""


class CheckpointError(SliderQuantError):
    """A checkpoint on disk is damaged, incomplete, inconsistent or from a future version."""
