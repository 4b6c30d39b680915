"""Where text comes from: data sets by name, files, and what every Python brings along.

A source is named `wikitext2`, `c4`, `stdlib`, `topics` or by the path of a file (plain text, or `.jsonl` with a "text"
field in each line), and may end in a slice of characters: `notes.txt[:400000]`, `stories.txt[-400000:]`.
"""

import ast
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sliderquant.errors import InputError

__all__ = ["NAMED_SOURCES", "Text", "check_source", "read_text"]

NAMED_SOURCES = ("wikitext2", "c4", "stdlib", "topics")

_SLICE = re.compile(r"(?P<source>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
_C4 = {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"}
_MINIMUM_DOCSTRING = 80  # characters; shorter ones are titles, not text


@dataclass(frozen=True)
class Text:
    """Either one running text, or documents whose tokens must not be joined.

    Attributes:
        name: the source as the user named it.
        documents: one string for a running text.
        running: whether `documents` is one running text.
    """

    name: str
    documents: tuple[str, ...]
    running: bool

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def check_source(source: str) -> None:
    """Raises InputError when a source that names a file cannot be there: cheap, before any long work."""
    name, _ = _split(source)
    if name in NAMED_SOURCES:
        return
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"text {source!r}: no such file; expected {', '.join(NAMED_SOURCES)}, or the path of a text or .jsonl file"
        )
    if path.stat().st_size == 0:
        raise InputError(f"text {source!r}: the file is empty")


def read_text(source: str, purpose: Literal["calibration", "evaluation"]) -> Text:
    """Read a source. Of data sets, the training part for calibration, and the test or validation part for evaluation.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or not JSON lines; the data set cannot be downloaded.
    """
    check_source(source)
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
        text = _from_file(source, Path(name).expanduser())
    if characters is not None:
        if not text.running:
            raise InputError(f"text {source!r}: a slice of characters needs one running text, not documents")
        text = Text(source, (text.documents[0][characters],), running=True)
    if not any(document.strip() for document in text.documents):
        raise InputError(f"text {source!r}: there is no text in it")
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
    if found is None:
        return source, None
    start, stop = (int(text) if text not in ("", "-") else None for text in (found["start"], found["stop"]))
    return found["source"], slice(start, stop)


def _from_file(source: str, path: Path) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {source!r}: not UTF-8 text (byte {error.start}); expected plain text or .jsonl"
        ) from error
    except OSError as error:
        raise InputError(f"text {source!r}: cannot be read: {error.strerror}") from error
    if path.suffix != ".jsonl":
        return Text(source, (content,), running=True)
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            documents.append(str(json.loads(line)["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f'text {source!r}: line {number} is not a JSON object with a "text" field') from error
    return Text(source, tuple(documents), running=False)


def _from_hub(dataset: str, split: str, **arguments: str) -> list[str]:
    from datasets import load_dataset

    try:
        return list(load_dataset(dataset, split=split, **arguments)["text"])
    except Exception as error:  # the library raises many kinds for no network, all of them ending the same way
        raise InputError(
            f"text {dataset}: could not be had from the Hugging Face hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): check the network, or give a local text file"
        ) from error
