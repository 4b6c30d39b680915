"""A file on disk -> characters: finding it, unpacking it, decoding it."""

import bz2
import codecs
import difflib
import glob
import gzip
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from sliderquant.errors import InputError

__all__ = ["COMPRESSED", "decoded", "find_file", "nearest", "read_bytes", "unpacked"]

_BOMS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
_NOT_TEXT = (
    (b"%PDF", "a PDF document: save its text to a file"),
    (b"PK\x03\x04", "a zip archive (as .docx, .xlsx, .npz and .pt are): unpack it, and give a text file of it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"SQLite format 3\0", "an SQLite data base: export its text first"),
    (b"\x80\x04\x95", "a Python pickle, which is never opened: save its text to a file"),
    (b"\x93NUMPY", "a numpy array: expected text, not token ids"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
    ),
)


def _zstandard_or_lz4(codec: str) -> Callable[[bytes], bytes]:
    def unpack(data: bytes) -> bytes:
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), codec) as stream:
            unpacked: bytes = stream.read()
            return unpacked

    return unpack


_PACKED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
    (b"\x5d\x00\x00", "lzma", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "Zstandard", _zstandard_or_lz4("zstd")),
    (b"\x04\x22\x4d\x18", "LZ4", _zstandard_or_lz4("lz4")),
)
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")
"""Endings that say how a file is packed, not what it holds."""


def find_file(source: str, name: str, known: Iterable[str]) -> Path:
    """The path of an ordinary file with something in it.

    Args:
        source: what the user wrote, for messages.
        name: of the file: `source` without its slice.
        known: names that are no files, for a suggestion.

    Raises:
        InputError: it is missing, empty, or something that cannot be read twice; the message says what to do.
    """
    where = f"text {source!r}"
    if not name:
        raise InputError(f"{where}: is empty; expected {', '.join(known)}, or the path of a file")
    if name == "-":
        raise InputError(f"{where}: standard input is not read: save the text to a file, and give its path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise InputError(f"{where}: addresses are not fetched: download the file, and give its path")
    try:
        path = Path(name).expanduser()
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError):
        raise InputError(f"{where}: no such file; {_instead(name, known)}") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(found.st_mode):
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file()) if os.access(path, os.R_OK) else []
        listed = f"; in it are {_some(files)}" if files else ""
        raise InputError(f"{where}: is a folder; expected one file{listed}")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{where}: is a pipe or a device: save the text to a file, and give its path")
    if found.st_size == 0:
        raise InputError(f"{where}: the file is empty")
    return path


def nearest(word: str, words: Iterable[str]) -> str | None:
    """That of `words` which `word` is most likely meant for, upper and lower case aside; None: none is near."""
    by_folded = {other.casefold(): other for other in words}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def read_bytes(source: str, path: Path) -> bytes:
    """Raises InputError when the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"text {source!r}: cannot be read: {error.strerror}") from error


def unpacked(source: str, data: bytes) -> bytes:
    """What a compressed file holds; other data as it is. By its content, whatever the file is called.

    Raises:
        InputError: the file is damaged.
    """
    for magic, name, unpack in _PACKED:
        if data.startswith(magic) and (name != "bzip2" or data[4:10] == b"1AY&SY"):
            try:
                inner = unpack(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise InputError(
                    f"text {source!r}: a {name} file that is damaged or cut off ({error}): get it again"
                ) from error
            return unpacked(source, inner)  # FILE.gz.gz happens
    return data


def decoded(where: str, data: bytes) -> str:
    """Characters of UTF-8, or of UTF-16 or UTF-32 with a byte order mark, which is left out; line ends are kept.

    `where` begins every message. Nothing is guessed: a wrong guess makes other characters of the same bytes.

    Raises:
        InputError: it is something else; the message says at which byte, and how to convert it.
    """
    for magic, what in _NOT_TEXT:
        if data.startswith(magic):
            raise InputError(f"{where}: is {what}")
    if data[257:262] == b"ustar":
        raise InputError(f"{where}: is a tar archive: unpack it, and give a text file of it")
    mark, codec, encoding = next((entry for entry in _BOMS if data.startswith(entry[0])), (b"", "utf-8", "UTF-8"))
    if encoding == "UTF-32" and len(data) % 4:
        mark, codec, encoding = codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"
    _check_for_zeros(where, data, codec)
    try:
        text = data[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        raise InputError(
            f"{where}: not {encoding} text (byte {place}): {_trouble(data, place, encoding, error)}"
        ) from error
    if "\0" in text:
        raise InputError(f"{where}: character {text.index(chr(0))} is NUL: not a text file")
    return text


def _check_for_zeros(where: str, data: bytes, codec: str) -> None:
    if codec != "utf-8" or b"\0" not in data:
        return
    head = data[:4096]
    pairs = len(head) // 2
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if pairs >= 4 and head[first::2].count(0) > 0.4 * pairs and head[1 - first :: 2].count(0) < 0.1 * pairs:
            raise InputError(
                f"{where}: looks like {name} without a byte order mark: convert it with "
                f"`iconv -f {name} -t UTF-8 FILE > NEW`"
            )
    raise InputError(f"{where}: byte {data.index(0)} is NUL: a binary file; expected text")


def _trouble(data: bytes, place: int, encoding: str, error: UnicodeDecodeError) -> str:
    if error.end >= len(error.object) and error.reason in ("unexpected end of data", "truncated data"):
        convert = ", or convert it with `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`" if encoding == "UTF-8" else ""
        return (
            f"the file ends in the middle of a character, or is not {encoding}: give the whole file, of which "
            f"FILE[:400000] takes a part{convert}"
        )
    if encoding != "UTF-8":
        return f"{error.reason}: the file is damaged, or not {encoding}"
    line = data.count(b"\n", 0, place) + 1
    return (
        f"line {line} has 0x{data[place]:02x} there; if it is Windows-1252 or Latin-1, convert it with "
        "`iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`"
    )


def _instead(name: str, known: Iterable[str]) -> str:
    """What to write in place of a file that there is not."""
    known = tuple(known)
    expected = f"expected {', '.join(known)}, or the path of a text, JSON, CSV or Parquet file"
    path = Path(name)
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which is missing"
    if re.search(r"[*?]", name) or (re.search(r"\[.*\]", name) and glob.glob(name)):
        matches = sorted(glob.glob(os.path.expanduser(name)))
        found = f", which matches {_some(matches)}" if matches else ""
        return f"patterns are not expanded{found}: give one file, joined with `cat` if need be"
    if name.endswith("]") and os.path.isfile(os.path.expanduser(name.rpartition("[")[0])):
        return "a part of a file is FILE[FIRST:LAST] with whole numbers of characters, such as FILE[:400000]"
    try:
        others = [entry.name for entry in path.expanduser().parent.iterdir()]
    except (OSError, ValueError, RuntimeError):
        others = []
    near = nearest(path.name, others)
    meant = str(path.parent / near) if near else nearest(name, known)
    return f"{expected}; did you mean {meant}?" if meant else expected


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
