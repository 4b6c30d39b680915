"""Kernels as Triton's compiler gets them: written down where a launch would compile, compiled later from the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

__all__ = ["Missing", "compile_all", "compile_text", "kernel_of", "only_cached", "source_digests", "text_of"]


class Missing(Exception):
    """A kernel that would have to be compiled."""


def text_of(source: Any, target: Any, options: Any) -> str:
    """One line of JSON for what the compiler gets: equal for launches that need the same kernel.

    Args:
        source: Triton's `ASTSource` of a kernel that a module defines.
        target: Triton's `GPUTarget`.
        options: named, or all of them.
    """
    from triton.compiler.compiler import make_backend

    function = source.fn.fn
    every = dict(make_backend(target).parse_options(dict(options or {})).__dict__)
    # The path of a library of Triton's, which is another one on another machine, and the default.
    every.pop("extern_libs", None)
    return json.dumps(
        {
            "module": function.__module__,
            "name": function.__name__,
            "arch": target.arch,
            "signature": list(source.signature.items()),
            "constants": [[list(path), _plain(value)] for path, value in sorted(source.constants.items())],
            "attributes": [[list(path), value] for path, value in source.attrs.items()],
            "options": {name: _plain(value) for name, value in sorted(every.items())},
        }
    )


def compile_text(text: str) -> Any:
    """Compile what `text_of` wrote down, or find it in Triton's cache on disk. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = json.loads(text)
    source = ASTSource(
        fn=kernel_of(found["module"], found["name"]),
        signature=dict(found["signature"]),
        constexprs={tuple(path): _lively(value) for path, value in found["constants"]},
        attrs={tuple(path): value for path, value in found["attributes"]},
    )
    options = {name: _lively(value) for name, value in found["options"].items()}
    return triton.compile(source, target=GPUTarget("cuda", found["arch"], 32), options=options)


def kernel_of(module: str, name: str) -> Any:
    """The kernel of that name.

    Raises:
        RuntimeError: TRITON_INTERPRET is set: kernels are interpreted.
    """
    import triton

    kernel = getattr(import_module(module), name)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    return kernel


def source_digests(texts: Iterable[str]) -> dict[str, str]:
    """What Triton's key holds of each kernel's source, by its name: lines, line number, and functions it calls."""
    names = {(found["module"], found["name"]) for found in map(json.loads, texts)}
    return {f"{module}.{name}": kernel_of(module, name).cache_key for module, name in sorted(names)}


@contextmanager
def only_cached() -> Iterator[None]:
    """Raise `Missing` wherever Triton would compile."""
    from triton.compiler import ASTSource

    def missing(*_: Any, **__: Any) -> None:
        raise Missing

    with patch.object(ASTSource, "make_ir", missing):
        yield


def compile_all(texts: list[str], processes: int, done: Callable[[int, int], None] | None = None) -> list[str]:
    """Compile into Triton's cache on disk, in processes with this one's environment.

    Args:
        texts: of the kernels.
        processes: that compile at the same time.
        done: called with the number of kernels that are done, and of all.

    Returns:
        What went wrong, a line for each kernel that could not be compiled.
    """
    errors = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for number, error in enumerate(pool.map(_attempt, texts, chunksize=4), 1):
            errors += [error] if error else []
            if done is not None:
                done(number, len(texts))
    return errors


def _attempt(text: str) -> str:
    try:
        compile_text(text)
    except Exception as error:  # a launch would raise it too
        return f"{json.loads(text)['name']}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _plain(value: Any) -> Any:
    """A constant in JSON, with what JSON has not as an object of one entry."""
    from triton.language import constexpr, dtype

    if isinstance(value, constexpr):
        return {"constexpr": _plain(value.value)}
    if isinstance(value, dtype):
        return {"dtype": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"constant {value!r} of type {type(value).__name__}: expected a number, a text, a dtype or a tuple")


def _lively(value: Any) -> Any:
    from triton.language import constexpr, dtype

    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_lively(item) for item in content)
    return constexpr(_lively(content)) if kind == "constexpr" else dtype(content)
