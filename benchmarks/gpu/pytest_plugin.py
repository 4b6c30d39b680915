"""A pytest plugin: notes every test's end in the run's folder at once, and leaves out what has no use.

Without it the names of failed tests are in pytest's last lines alone, which nobody sees of a pytest that was killed.
Tests that ended in an earlier attempt are not repeated, nor are those of kernel families that failed `smoke`. What an
earlier attempt is, is settled before pytest starts: processes that xdist starts later, for one that died, must find the
same tests.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .failures import failed, families_of, is_left_out
from .state import State

__all__ = ["LEFT_OUT", "STATE", "pytest_collection_modifyitems", "pytest_configure", "widths_of"]

# The run's folder.
STATE = "SLIDERQUANT_GPU_STATE"
# In it, the ids of tests that are not to be run again.
LEFT_OUT = "tests-left-out.json"
PHASE = "tests"
_LONGEST = 1500


def widths_of(parameters: dict[str, Any]) -> set[int]:
    """The widths of weights that a test's parameters name: `bits=3`, or a scheme such as `W3A16-g64`."""
    found = set()
    for name, value in parameters.items():
        if name == "bits" and isinstance(value, int):
            found.add(value)
        elif isinstance(value, str) and (match := re.match(r"W(\d)A\d", value)):
            found.add(int(match[1]))
    return found


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    state = State(Path(os.environ[STATE]))
    broken = failed(state)
    file = state.folder / LEFT_OUT
    before = set(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else set()
    kept, left = [], []
    for item in items:
        families = families_of(item.nodeid)
        widths: set[int | None] = {None, *widths_of(getattr(getattr(item, "callspec", None), "params", {}))}
        useless = any(is_left_out(broken, family, width) for family in families for width in widths)
        (left if useless or item.nodeid in before else kept).append(item)
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


def pytest_configure(config: Any) -> None:
    # Processes of xdist send what they report to the one that started them: that one notes it.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Notes(), "sliderquant-gpu-notes")


class _Notes:
    """Notes how every test begins and ends."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _add({"key": nodeid, "outcome": "begun", "seconds": 0.0})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, Any] = {"key": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            row["text"] = str(report.longrepr)[-_LONGEST:]
        elif report.outcome == "skipped":
            row["text"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        _add(row)


def _add(row: dict[str, Any]) -> None:
    State(Path(os.environ[STATE])).add(PHASE, row)
