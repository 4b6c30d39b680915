"""Result files: one JSON per run, with the machine that it ran on."""

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_name", "environment", "markdown", "write"]

FOLDER = Path(__file__).parent / "results"


def device_name() -> str:
    """A name for the folder of this machine's results."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return "cpu"


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as a reader needs them."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(),
        "cpu": f"{platform.machine()} {capability}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
    }


def write(name: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write `rows` and the environment to `<folder>/<device>/<name>.json` and return the path."""
    path = (folder or FOLDER) / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table of some columns of the rows."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
