"""One JSON file per device and subset, which can be resumed.

    {"schema": 1, "runs": [...], "rows": [...], "goals": [...]}

A run is what was true of one start of the command: machine, versions, floors, clocks, date. A row is one case with one
provider, and names its run. While rows are measured, each is appended to a journal next to the file as soon as it is
there; the file itself is only ever replaced as a whole, and the journal removed after that. Whatever kills a run costs
the row that was being made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .figures import row_key

__all__ = ["SCHEMA", "Store", "load", "write"]

SCHEMA = 1
Row = dict[str, Any]
# What `derive` adds and a row on disk need not be believed for.
DERIVED = (
    "floor_us", "percent_of_floor", "gbps", "percent_of_copy", "tflops",
    "ratio_to_16bit", "best_peer", "ratio_to_best_peer", "runs_mixed",
)  # fmt: skip
# Rows of these need not be measured again; errors are tried again.
SETTLED = ("ok", "unsupported")


class Store:
    """The rows of a file. Not for two processes at a time."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path, self.journal = path, path.with_suffix(".journal")
        self.runs: list[dict[str, Any]] = []
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._run: int | None = None
        if not fresh:
            self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.journal.unlink(missing_ok=True)
        # What the journal held is in memory; a new one starts with all of it, so that the torn end of a line is gone.
        if self.journal.exists():
            self.write([])

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which their keys first came."""
        return list(self._rows.values())

    def begin(self, run: dict[str, Any]) -> int:
        """Start a run; its number goes into the rows that follow."""
        self._run = 1 + max((known["id"] for known in self.runs), default=-1)
        self._append({"run": {"id": self._run, **run}})
        self.runs.append({"id": self._run, **run})
        return self._run

    def forget(self, outdated: Callable[[Row], bool]) -> None:
        """Drop rows that are not true any more; they leave the disk with the next `write`."""
        self._rows = {key: row for key, row in self._rows.items() if not outdated(row)}

    def update(self, **facts: Any) -> None:
        """Add facts to the current run; they reach the disk with the next `write`."""
        self.runs[-1] |= facts

    def has(self, key: tuple[Any, ...], version: str) -> bool:
        """Whether a row of this key and version needs no further measurement."""
        row = self._rows.get(key)
        return row is not None and row["status"] in SETTLED and row["version"] == version

    def add(self, row: Row, version: str) -> Row:
        """Keep a row, also if this process ends the next moment."""
        if self._run is None:
            raise RuntimeError("begin a run before adding rows to it")
        row = {**row, "version": version, "run": self._run}
        self._append({"row": row})
        self._rows[row_key(row)] = row
        return row

    def write(self, goals: Iterable[Any], rows: Iterable[Row] | None = None) -> None:
        """Replace the file, with `rows` (the same ones, completed) if given, and drop the journal."""
        kept = self.rows if rows is None else list(rows)
        used = {row["run"] for row in kept} | ({self._run} if self._run is not None else set())
        runs = [run for run in self.runs if run["id"] in used]
        write(self.path, {"runs": runs, "rows": kept, "goals": list(goals)})
        self.journal.unlink(missing_ok=True)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        if self.path.exists():
            content = load(self.path)
            self.runs = content["runs"]
            self._rows = {row_key(row): row for row in content["rows"]}
        if self.journal.exists():
            for line in self.journal.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # The line that was being written when the process was killed.
                    continue
                if "run" in entry:
                    self.runs.append(entry["run"])
                else:
                    self._rows[row_key(entry["row"])] = entry["row"]


def load(path: Path) -> dict[str, Any]:
    """A file's content; rows without what follows from them. Raises ValueError for another schema."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')}; measure again with --fresh")
    for row in content["rows"]:
        for column in DERIVED:
            row.pop(column, None)
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` at once: a reader sees the old file or the new one. One line per run, row and goal."""
    lines = [f'{{"schema": {SCHEMA}']
    for name, entries in content.items():
        body = ",\n".join(json.dumps(_rounded(entry)) for entry in entries)
        lines.append(f'"{name}": [\n{body}\n]' if body else f'"{name}": []')
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(",\n".join(lines) + "}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _rounded(value: Any) -> Any:
    """Floats to five digits: more is noise, and nobody reads it."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return value
