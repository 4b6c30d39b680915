"""Exit codes: 0; 2 wrong use; 1 failure. One clear line on stderr, a traceback only with -v."""

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import typer

from sliderquant.errors import InputError, SliderQuantError

__all__ = ["reported"]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into an exit code and one line."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        if not verbose:
            _hush_libraries()
        try:
            command(*args, **kwargs)
        except InputError as error:
            _fail(2, str(error), verbose)
        except KeyboardInterrupt:
            _fail(1, "interrupted; nothing was left behind", verbose)
        except SliderQuantError as error:
            _fail(1, str(error), verbose)
        except typer.Exit:
            raise
        except BrokenPipeError:  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            _fail(1, f"{type(error).__name__}: {error} (run again with -v for a traceback)", verbose)

    return wrapper


def _fail(code: int, message: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"sliderquant: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def _hush_libraries() -> None:
    """The libraries' own notes and bars belong into -v: ours say what is going on."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
