"""Where text comes from: data sets by name, files, and what every Python brings along.

A source is named `wikitext2`, `c4`, `stdlib`, `topics` or by the path of a file, and may end in a slice of characters:
`notes.txt[:400000]`, `stories.txt[-400000:]`. A file is plain text, or by its name JSON, JSON Lines, CSV, Parquet or
Arrow, see `sliderquant.calibration.records`; and it may be compressed.
"""

import ast
import os
import re
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sliderquant.calibration.files import COMPRESSED, decoded, find_file, read_bytes, unpacked
from sliderquant.calibration.records import Document, csv_documents, json_documents, table_documents
from sliderquant.errors import InputError

__all__ = ["DOWNLOADED", "NAMED_SOURCES", "Text", "check_source", "downloaded", "read_text"]

NAMED_SOURCES = ("wikitext2", "c4", "stdlib", "topics")
DOWNLOADED = ("wikitext2", "c4")

_SLICE = re.compile(r"(?P<source>.+)\[ *(?P<start>(?:-?[0-9]+)?) *: *(?P<stop>(?:-?[0-9]+)?) *\]", re.DOTALL)
_NO_SLICE = (
    "a slice of characters needs one running text, and these are documents: put those that are wanted into a file of "
    "their own"
)
_JSON = (".json", ".jsonl", ".ndjson", ".jsonlines")
_CSV = (".csv", ".tsv")
_TABLES = (".parquet", ".arrow", ".feather")
_C4 = {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"}
_MINIMUM_DOCSTRING = 80  # characters; shorter ones are titles, not text


@dataclass(frozen=True)
class Text:
    """Either one running text, or documents whose tokens must not be joined.

    Attributes:
        name: the source as the user named it.
        documents: one string for a running text; else strings, and conversations for a chat template.
        running: whether `documents` is one running text.
        notes: what the user should know about where it came from.
    """

    name: str
    documents: tuple[Document, ...]
    running: bool
    notes: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def check_source(source: str | Path | None) -> None:
    """Raises InputError when a source that names a file cannot be there: cheap, before any long work."""
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"text {source!r}: expected one name or path, a string")
    name, characters = _split(str(source))
    if name == "c4" and characters is not None:
        raise InputError(f"text {str(source)!r}: {_NO_SLICE}")
    if name not in NAMED_SOURCES:
        find_file(str(source), name, NAMED_SOURCES)


def downloaded(source: str) -> bool:
    """Whether reading the source may take a network."""
    return _split(str(source))[0] in DOWNLOADED


def read_text(source: str, purpose: Literal["calibration", "evaluation"]) -> Text:
    """Read a source. Of data sets, the training part for calibration, and the test or validation part for evaluation.

    Raises:
        InputError: the file is missing, empty, or not of a kind that is read; the data set cannot be downloaded.
    """
    check_source(source)
    source = str(source)
    name, characters = _split(source)
    if name == "wikitext2":
        split = "train" if purpose == "calibration" else "test"
        lines = _from_hub("Salesforce/wikitext", split, name="wikitext-2-raw-v1")
        text = Text(source, ("\n\n".join(lines),), running=True)
    elif name == "c4":
        documents = _from_hub("allenai/c4", "train", data_files=_C4[purpose])
        text = Text(source, tuple(documents), running=False)
    elif name == "stdlib":
        text = Text(source, (standard_library_docstrings(),), running=True)
    elif name == "topics":
        text = Text(source, (python_topics(),), running=True)
    else:
        text = _from_file(source, find_file(source, name, NAMED_SOURCES))
    if characters is not None:
        if not text.running:
            raise InputError(f"text {source!r}: {_NO_SLICE}")
        (whole,) = text.documents
        assert isinstance(whole, str)
        text = Text(source, (whole[characters],), running=True)
        if not text.documents[0]:
            raise InputError(f"text {source!r}: no characters are left of {len(whole)}: expected FIRST below LAST")
    if not any(document.strip() for document in text.documents):
        raise InputError(f"text {source!r}: there is no text in it")
    if name in NAMED_SOURCES and os.path.exists(name):
        note = f"text {source!r} is the source of this name, not the file or folder here: ./{name} would be that"
        text = replace(text, notes=(note,))
    return text


def standard_library_docstrings() -> str:
    """The docstrings of the running Python's standard library, in the order of its files, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
    found = []
    for path in sorted(root.rglob("*.py")):
        if left_out & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) >= _MINIMUM_DOCSTRING:
                    found.append(docstring)
    return "\n\n".join(found)


def python_topics() -> str:
    """The language reference that `help()` shows, joined in alphabetical order of the topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _split(source: str) -> tuple[str, slice | None]:
    found = _SLICE.fullmatch(source)
    if found is None or os.path.isfile(os.path.expanduser(source)):
        return source, None
    start, stop = (int(text) if text else None for text in (found["start"], found["stop"]))
    return found["source"], slice(start, stop)


def _from_file(source: str, path: Path) -> Text:
    data = unpacked(source, read_bytes(source, path))
    suffixes = [suffix.casefold() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in _TABLES or data.startswith((b"PAR1", b"ARROW1\0\0")):
        return Text(source, table_documents(source, data), running=False)
    # As files opened for text are read: every line end is a line feed.
    content = decoded(f"text {source!r}", data)
    if kind in _JSON:
        return Text(source, json_documents(source, content), running=False)
    if kind in _CSV:
        return Text(source, csv_documents(source, content), running=False)
    return Text(source, (content.replace("\r\n", "\n").replace("\r", "\n"),), running=True)


def _from_hub(dataset: str, split: str, **arguments: str) -> list[str]:
    from datasets import load_dataset

    try:
        return list(load_dataset(dataset, split=split, **arguments)["text"])
    except Exception as error:  # the library raises many kinds for no network, all of them ending the same way
        raise InputError(
            f"text {dataset}: could not be had from the Hugging Face hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): check the network, or give a local text file"
        ) from error
