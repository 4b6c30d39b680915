"""Text files in all encodings, packings and shapes, as users have them."""

import bz2
import gzip
import lzma
import os

import pytest

from sliderquant.calibration.text import check_source, read_text
from sliderquant.errors import InputError

TEXT = "Äpfel 😀 one\ntwo"
LINES = b'{"text": "a"}\n{"text": "b"}\n'


def read(path):
    return read_text(str(path), "calibration")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + TEXT.encode(),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"),
        b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
    ],
)
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    assert read(tmp_path / "t.txt").documents == (TEXT,)


def test_all_line_ends_are_line_feeds(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\rc\n")
    assert read(tmp_path / "t.txt").documents == ("a\nb\nc\n",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb café x".encode("cp1252"), r"not UTF-8 text \(byte 7\): line 2 has 0xe9 there; .*iconv -f WINDOWS-1252"),
        ("é".encode()[:1], "ends in the middle of a character"),
        (b"\xff\xfea\0b", "not UTF-16 text .* ends in the middle of a character"),
        ("plain text".encode("utf-16-le"), "looks like UTF-16LE without .*iconv -f UTF-16LE"),
        ("plain text".encode("utf-16-be"), "looks like UTF-16BE"),
        (b"abc\0def", "byte 3 is NUL: a binary file"),
        (b"%PDF-1.7 \0", "a PDF document"),
        (b"PK\x03\x04\0", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (gzip.compress(b"hello" * 99, mtime=0)[:-9], "a gzip file that is damaged or cut off"),
        (
            gzip.compress(lzma.compress(b"hello" * 99)[:-9], mtime=0),
            "^text '[^']*': a xz file that is damaged or cut off",
        ),
        (gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 300, mtime=0), "a tar archive"),
        (b"\xef\xbb\xbf", "there is no text in it"),
    ],
)
def test_what_is_not_text_is_refused_and_never_guessed(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "t.txt")
    assert "t.txt" in str(caught.value)


def zstandard(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", zstandard),
        ("lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
        ("gz.xz", lambda data: lzma.compress(gzip.compress(data))),
    ],
)
def test_compressed_files_are_what_they_hold(tmp_path, ending, pack):
    (tmp_path / f"d.jsonl.{ending}").write_bytes(pack(LINES))
    (tmp_path / f"t.{ending}").write_bytes(pack(b"running"))
    assert read(tmp_path / f"d.jsonl.{ending}").documents == ("a", "b")
    assert read(tmp_path / f"t.{ending}").documents == ("running",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder; expected one file; in it are a.txt"),
        ("*.txt", "patterns are not expanded, which matches notes.txt: give one file"),
        ("https://example.org/a.txt", "addresses are not fetched"),
        ("-", "standard input is not read"),
        ("", "is empty"),
        ("note.txt", r"no such file; .*did you mean notes\.txt\?"),
        ("wikitext", r"did you mean wikitext2\?"),
        ("notes.txt[5]", r"FILE\[FIRST:LAST\]"),
        ("notes.txt[::2]", r"FILE\[FIRST:LAST\]"),
        ("notes.txt[5:2]", "no characters are left of 10"),
        ("notes.txt[99:]", "no characters are left of 10"),
        ("c4[:10]", "these are documents"),
        ("pipe", "is a pipe"),
        ("link", "it is a link to nowhere, which is missing"),
        ("a\0b", "no such file"),
    ],
)
def test_what_is_no_file_is_named_with_what_to_do(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("0123456789")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("x")
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    with pytest.raises(InputError, match=message):
        read_text(name, "calibration")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable for root")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "t.txt").chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read(tmp_path / "t.txt")


def test_a_path_is_as_good_as_its_name_and_other_things_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    assert read_text(tmp_path / "t.txt", "calibration").name == str(tmp_path / "t.txt")
    with pytest.raises(InputError, match="expected one name or path"):
        check_source(["a.txt"])


def test_a_name_that_a_file_has_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "topics").write_text("mine")
    (note,) = read_text("topics", "calibration").notes
    assert "./topics would be that" in note
    assert read_text("./topics", "calibration").documents == ("mine",)
    (tmp_path / "f[:2]").write_text("whole")
    assert read_text("f[:2]", "calibration").documents == ("whole",)
