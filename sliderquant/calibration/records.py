"""Files of records -> documents: JSON, JSON Lines, CSV, Parquet and Arrow."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sliderquant.errors import InputError

__all__ = ["FIELDS", "Conversation", "Document", "csv_documents", "json_documents", "table_documents"]


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with `role` and `content`, and what else it has.
        tools: descriptions of tools for the template; None: none.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        """Characters of the contents."""
        return sum(len(message.get("content") or "") for message in self.messages)

    def strip(self) -> str:
        """The contents of the messages, without white space around them."""
        return "".join(message.get("content") or "" for message in self.messages).strip()


Document = str | Conversation

_BLANKS = re.compile(r"[ \t\r\n]*")
_MESSAGES = ("messages", "conversations", "conversation")
_PAIRS = (
    # The fields, and what stands between them.
    (("prompt",), ("completion", "response", "chosen"), ""),
    (("instruction",), ("output", "response"), "\n\n"),
    (("question",), ("answer",), "\n\n"),
)
_FURTHER = ("input", "context")
FIELDS = (
    "text", *_MESSAGES, "prompt", "completion", "response", "chosen", "instruction", "input", "context", "output",
    "question", "answer", "content", "tools",
)  # fmt: skip
"""Of a record, those that are read."""
_CONTAINERS = ("data", "rows", "examples", "documents", "records")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
_EXPECTED = (
    'expected "text", "messages", "conversations", "prompt" and "completion", "instruction" and "output", "question" '
    'and "answer", or "content"'
)


def json_documents(source: str, content: str) -> tuple[Document, ...]:
    """Of JSON Lines, of one array, or of one object that holds an array or is a record itself; by the content.

    Raises:
        InputError: naming the line or element that is not a document.
    """
    where = f"text {source!r}"
    # JSON ends lines with these alone: others, such as U+2028, may stand inside a string.
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", content), 1) if line.strip()]
    if not lines:
        raise InputError(f"{where}: there is no text in it")
    if len(lines) == 1 or not _parses(lines[0][1]):
        return tuple(_whole(where, content, lines))
    documents = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: line {number} is not JSON: {_reason(error)}") from error
        documents.append(_document(record, f"{where}: line {number}"))
    return tuple(documents)


def csv_documents(source: str, content: str) -> tuple[Document, ...]:
    """Of a table with a header line, separated by commas, semicolons or tabs.

    Raises:
        InputError: it has no column that is read, or a broken line, which is named.
    """
    where = f"text {source!r}"
    header = re.split(r"[\r\n]", content.lstrip("\r\n"), maxsplit=1)[0]
    for separator in ",;\t":
        columns = next(csv.reader([header], delimiter=separator), [])
        if not {column.strip() for column in columns}.isdisjoint(FIELDS):
            break
    else:
        raise InputError(f"{where}: its header line names no column that is read: {_EXPECTED}")
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    documents = []
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            surplus = row.pop(None, [])
            if any(field.strip() for field in surplus):
                named = len(reader.fieldnames)
                raise InputError(
                    f"{where}: line {reader.line_num} has {named + len(surplus)} fields, the header {named}: put text "
                    'that holds the separator into double quotes, ""'
                )
            documents.append(_document(row, f"{where}: line {reader.line_num}"))
    except csv.Error as error:
        raise InputError(f"{where}: the record that begins in line {reader.line_num + 1} is broken: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return tuple(documents)


def table_documents(source: str, data: bytes) -> tuple[Document, ...]:
    """Of a Parquet or Arrow file.

    Raises:
        InputError: it is damaged, or has no column that is read.
    """
    import pyarrow
    from pyarrow import ipc, parquet

    where = f"text {source!r}"
    buffer = pyarrow.BufferReader(data)
    try:
        if data.startswith(b"PAR1"):
            names = parquet.read_schema(buffer).names
            buffer.seek(0)
            table = parquet.read_table(buffer, columns=_known(where, names))
        else:
            opened = ipc.open_file(buffer) if data.startswith(b"ARROW1") else ipc.open_stream(buffer)
            table = opened.read_all()
            table = table.select(_known(where, table.column_names))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: a Parquet or Arrow file that is damaged or cut off ({_reason(error)}): get it again"
        ) from error
    return tuple(_document(row, f"{where}: row {number}") for number, row in enumerate(rows))


def _known(where: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    known = [name for name in columns if name in FIELDS]
    if repeated := sorted({name for name in known if known.count(name) > 1}):
        raise InputError(f"{where}: has more than one column {', '.join(repeated)}: rename all but one")
    if not known:
        raise InputError(f"{where}: has the columns {', '.join(columns) or 'none'}; {_EXPECTED}")
    return known


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _whole(where: str, content: str, lines: list[tuple[int, str]]) -> Iterator[Document]:
    """Of values that go over several lines; `lines`: those that are not blank, with their numbers."""
    decoder = json.JSONDecoder()
    place = _after_blanks(content, 0)
    values: list[Any] = []
    while place < len(content):
        try:
            value, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError) as error:
            number = content.count("\n", 0, getattr(error, "pos", place)) + 1
            if not values and len(lines) > 1 and _parses(lines[1][1]) and lines[0][1].lstrip()[:1] != "[":
                number = lines[0][0]  # the first of JSON Lines goes on over its end
            raise InputError(f"{where}: line {number} is not JSON: {_reason(error)}") from error
        values.append(value)
        place = _after_blanks(content, place)
    if len(values) > 1:
        for number, value in enumerate(values):
            yield _document(value, f"{where}: value {number}")
        return
    (value,) = values
    if isinstance(value, list) and not _is_conversation(value):
        for number, element in enumerate(value):
            yield _document(element, f"{where}: element {number}")
        return
    if isinstance(value, dict):
        column = value.get("text")
        if isinstance(column, dict):  # pandas: a column by the number of the row
            column = list(column.values())
        if isinstance(column, list):
            for number, element in enumerate(column):
                yield _string(element, f'{where}: "text" {number}')
            return
        held = next((value[name] for name in _CONTAINERS if isinstance(value.get(name), list)), None)
        if column is None and held is not None:
            for number, element in enumerate(held):
                if isinstance(element, dict) and isinstance(element.get("row"), dict):
                    element = element["row"]
                yield _document(element, f"{where}: element {number}")
            return
    yield _document(value, f"{where}: line {lines[0][0]}")


def _after_blanks(content: str, place: int) -> int:
    found = _BLANKS.match(content, place)
    assert found is not None
    return found.end()


def _document(record: Any, where: str) -> Document:
    if isinstance(record, str):
        return _string(record, where)
    if isinstance(record, list) and _is_conversation(record):
        return _conversation(record, None, where)
    if not isinstance(record, dict):
        raise InputError(f"{where} is {_kind(record)}, not a JSON object or a string: {_EXPECTED}")
    if record.get("text") is not None:
        return _string(record["text"], f'{where}: "text"')
    for name in _MESSAGES:
        if record.get(name) is not None:
            return _conversation(record[name], record.get("tools"), f'{where}: "{name}"')
    for firsts, seconds, between in _PAIRS:
        first = next((name for name in firsts if record.get(name) is not None), None)
        second = next((name for name in seconds if record.get(name) is not None), None)
        if first is None or second is None:
            continue
        if isinstance(record[second], list):
            asked = record[first] if isinstance(record[first], list) else [{"role": "user", "content": record[first]}]
            return _conversation([*asked, *record[second]], record.get("tools"), f'{where}: "{second}"')
        names = (first, *(name for name in _FURTHER if between and record.get(name)), second)
        parts = (_string(record[name], f'{where}: "{name}"') for name in names)
        return between.join(part for part in parts if part)
    if record.get("content") is not None:
        return _string(record["content"], f'{where}: "content"')
    if "text" in record:
        raise InputError(f'{where}: "text" is null; expected a string')
    raise InputError(f"{where} has the fields {', '.join(map(str, record)) or 'none'}; {_EXPECTED}")


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _conversation(messages: Any, tools: Any, where: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where} is {_kind(messages)}; expected a list of messages with "role" and "content"')
    return Conversation(
        tuple(_message(message, f"{where}: message {number}") for number, message in enumerate(messages)),
        tuple(tools) if isinstance(tools, list) and tools else None,
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f'{where} is {_kind(message)}; expected an object with "role" and "content"')
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise InputError(f'{where} has no "role" (or "from")')
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{where} holds something other than text")
        content = "".join(part for part in parts if isinstance(part, str))
    if content is None and not message.get("tool_calls"):
        raise InputError(f'{where} has no "content" (or "value")')
    further = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    return {
        "role": _ROLES.get(role, role),
        # Templates write the content of every message; a call of tools alone has none.
        "content": "" if content is None else _string(content, where),
        **{key: value for key, value in further.items() if value is not None},
    }


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {_kind(value)}; expected a string")
    lone = re.search("[\ud800-\udfff]", value)
    if lone:
        raise InputError(
            f"{where}: character {lone.start()} is \\u{ord(lone[0]):04x}, half of a surrogate pair, which is no "
            "character: correct it, or leave the record out"
        )
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else f"of the type {type(value).__name__}"


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return " ".join(str(error).split())[:200]
