"""Choices that were measured on a GPU, in `tuned/<device>.json`, before the rules of `tiles`.

A file holds the device's name, what measured it, and entries: a weight's shape and scheme, the number of tokens up to
which the choice holds (from the entry before), and the fields of a `Choice`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..common.choices import Choice, Device, Problem
from . import tiles

FOLDER = Path(__file__).parent / "tuned"
VERSION = 1


def choose(problem: Problem, device: Device, variant: str | None = None, batch_invariant: bool = False) -> Choice:
    """`tiles.choose`, unless the shipped table of this device has an entry for the problem."""
    if variant is None and not batch_invariant and device.name:
        for up_to, choice in _table(device.name).get(key(problem), ()):
            if problem.m <= up_to:
                return choice
    return tiles.choose(problem, device, variant, batch_invariant)


def key(problem: Problem) -> tuple[Any, ...]:
    """What an entry is looked up by: all of a problem but the number of tokens."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return (problem.n, problem.k, problem.bits, problem.group_size, problem.symmetric, dtype)


def file_name(device_name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def write(path: Path, device: Device, entries: dict[tuple[Any, ...], list[tuple[int, Choice]]], **about: Any) -> None:
    """Write a table, whole or not at all; `about` says with what it was measured."""
    rows = [
        {"weight": list(of), "up_to": up_to, "choice": {k: v for k, v in asdict(choice).items() if k != "reason"}}
        for of, choices in entries.items()
        for up_to, choice in sorted(choices, key=lambda entry: entry[0])
    ]
    content = {"version": VERSION, "device": device.name, "arch": device.arch, **about, "entries": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[tuple[Any, ...], list[tuple[int, Choice]]]:
    """The entries of a table, by `key`, in ascending order of tokens.

    Raises:
        ValueError: the file is not a table of this version.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {content.get('version')}; tune again")
    entries: dict[tuple[Any, ...], list[tuple[int, Choice]]] = {}
    for row in content["entries"]:
        choice = replace(Choice(**row["choice"]), reason=f"measured on {content['device']}")
        entries.setdefault(tuple(row["weight"]), []).append((row["up_to"], choice))
    return entries


@lru_cache(maxsize=16)
def _table(device_name: str) -> dict[tuple[Any, ...], list[tuple[int, Choice]]]:
    path = FOLDER / file_name(device_name)
    return read(path) if path.is_file() else {}


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a key."""
    return getattr(torch, name)
