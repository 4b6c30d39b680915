"""A plugin of pytest that runs tests for a GPU without one, and notes the kernels that they would launch.

Nothing is computed, so what tests assert is evaluated, for the launches in it, and ignored.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.assertion import rewrite

from .device import absent_gpu
from .kernels import text_of

__all__ = ["FOLDER_VARIABLE"]

FOLDER_VARIABLE = "SLIDERQUANT_RECORDED"


class _WithoutAsserts(ast.NodeTransformer):
    """`assert x` becomes an attempt at x; functions named `assert_...` do nothing: references take long."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        attempt = ast.Try(
            body=[ast.Expr(node.test)],
            handlers=[ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=[ast.Pass()])],
            orelse=[],
            finalbody=[],
        )
        return ast.copy_location(attempt, node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # Not a fixture of that name, which returns one of them.
        if node.name.lstrip("_").startswith("assert_") and not node.decorator_list:
            node.body = [ast.copy_location(ast.Pass(), node)]
            return node
        return self.generic_visit(node)


def _rewritten(module: ast.Module, *_: Any, **__: Any) -> None:
    _WithoutAsserts().visit(module)
    ast.fix_missing_locations(module)


_kernels: set[str] = set()
_outcomes: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _kernels.clear()
    _outcomes.clear()
    result = yield
    line = {"name": item.nodeid, "outcomes": _outcomes, "kernels": sorted(_kernels)}
    with (Path(os.environ[FOLDER_VARIABLE]) / f"tests-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.excinfo is not None:
        _outcomes.append(f"{report.outcome} {call.when}: {call.excinfo.exconly()[:300]}")
    return report


if FOLDER_VARIABLE in os.environ:
    rewrite.rewrite_asserts = _rewritten
    # Neither found compiled with the asserts nor left behind without them.
    rewrite._read_pyc = lambda *_, **__: None
    sys.dont_write_bytecode = True
    torch.testing.assert_close = lambda *_, **__: None
    torch.library.opcheck = lambda op, arguments, **_: op(*arguments)
    _gpu = absent_gpu(lambda *compiled: _kernels.add(text_of(*compiled)))
    _gpu.__enter__()  # as long as the process: conftest files ask for a GPU before any hook is called
