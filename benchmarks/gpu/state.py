"""What a run knows so far, in a folder: the rows of every phase as they come, how each phase ended, and a log.

A phase is a process of its own that may die at any time, and so may the whole run: a row is one line of
`PHASE.jsonl`, written at once, and `outcomes.json` is replaced as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Outcome", "State", "Status", "begun"]

# done: all of it. partial: its time was up, and there is more. failed: it ended with an error. waiting: its turn did
# not come. skipped: there is no use in it, and the detail says why.
Status = Literal["done", "partial", "failed", "waiting", "skipped"]
MOST_ATTEMPTS = 2
OUTCOMES = "outcomes.json"


@dataclass(frozen=True)
class Outcome:
    """How a phase ended.

    Attributes:
        seconds: of all attempts together.
        attempts: how often it was started.
        detail: why it failed or was skipped; the last lines that it printed.
        sources: digest of the sources that it ran with.
    """

    status: Status = "waiting"
    seconds: float = 0.0
    attempts: int = 0
    detail: str = ""
    sources: str = ""

    @property
    def finished(self) -> bool:
        """Whether all of it was done, or there is no use in it."""
        return self.status in ("done", "skipped")

    @property
    def is_left(self) -> bool:
        """Whether resuming goes on with it: what failed is tried once more, what was skipped is thought of again."""
        return self.status != "done" and (self.status != "failed" or self.attempts < MOST_ATTEMPTS)


def begun(folder: Path) -> bool:
    """Whether a folder, if it is there at all, holds a run."""
    return (folder / OUTCOMES).is_file()


class State:
    """The folder of a run."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: is made when it is not there.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def device(self) -> str:
        """What the run is on, as it was set; empty before that."""
        path = self.folder / "device"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @device.setter
    def device(self, name: str) -> None:
        write_whole(self.folder / "device", name)

    @property
    def log(self) -> Path:
        """What all phases printed."""
        return self.folder / "log.txt"

    def outcomes(self) -> dict[str, Outcome]:
        """How the phases ended, by name; a phase that never ran is not in it."""
        if not self._outcomes_file.is_file():
            return {}
        found = json.loads(self._outcomes_file.read_text(encoding="utf-8"))
        return {name: Outcome(**fields) for name, fields in found.items()}

    def outcome(self, phase: str) -> Outcome:
        """How a phase ended; `waiting` if it never ran."""
        return self.outcomes().get(phase, Outcome())

    def keep(self, phase: str, outcome: Outcome) -> None:
        """Note how a phase ended."""
        known = {name: asdict(each) for name, each in {**self.outcomes(), phase: outcome}.items()}
        write_whole(self._outcomes_file, json.dumps(known, indent=1) + "\n")

    def add(self, phase: str, row: Mapping[str, Any]) -> None:
        """Add a row of a phase."""
        path = self._rows_file(phase)
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn and path.stat().st_size else "") + json.dumps(row) + "\n")

    def rows(self, phase: str) -> list[dict[str, Any]]:
        """The rows of a phase; of several with the same `key` the last one. A line that was torn is left out."""
        path = self._rows_file(phase)
        if not path.is_file():
            return []
        found: dict[Any, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row.get("key", number)] = row
        return list(found.values())

    @property
    def _outcomes_file(self) -> Path:
        return self.folder / OUTCOMES

    def _rows_file(self, phase: str) -> Path:
        return self.folder / f"{phase}.jsonl"


def write_whole(path: Path, text: str) -> None:
    """Replace a file; readers see the old text or the new one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
