import json

import pytest

from sliderquant.calibration.text import check_source, python_topics, read_text, standard_library_docstrings
from sliderquant.errors import InputError


def test_a_text_file_is_one_running_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo", encoding="utf-8")
    text = read_text(str(path), "calibration")
    assert (text.documents, text.running, text.characters) == (("one\n\ntwo",), True, 8)


@pytest.mark.parametrize(
    ("part", "expected"), [("[:3]", "012"), ("[-3:]", "789"), ("[2:5]", "234"), ("[:-8]", "01"), ("[:]", "0123456789")]
)
def test_a_slice_takes_characters(tmp_path, part, expected):
    path = tmp_path / "digits.txt"
    path.write_text("0123456789")
    assert read_text(f"{path}{part}", "evaluation").documents == (expected,)


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "url": "x"}) for text in ("a", "b")) + "\n\n")
    text = read_text(str(path), "calibration")
    assert (text.documents, text.running) == (("a", "b"), False)


def test_what_python_brings_along():
    docstrings = standard_library_docstrings()
    assert len(docstrings) > 500_000
    assert "Return" in docstrings
    assert docstrings == standard_library_docstrings()
    assert len(python_topics()) > 200_000
    assert read_text("topics[:100]", "evaluation").characters == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"no such file; expected wikitext2, c4, stdlib, topics"),
        ("empty.txt", b"", "the file is empty"),
        ("blank.txt", b" \n ", "there is no text in it"),
        ("latin.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1 has the fields body; expected .text"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(str(path), "calibration")
    assert name in str(caught.value)


def test_the_cheap_check_finds_missing_and_empty_files(tmp_path):
    check_source("wikitext2")
    check_source("topics[:10]")
    with pytest.raises(InputError, match="no such file"):
        check_source(str(tmp_path / "no.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="empty"):
        check_source(str(tmp_path / "empty.txt[:5]"))


def test_documents_cannot_be_sliced(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="needs one running text"):
        read_text(f"{path}[:1]", "calibration")


def test_a_data_set_without_a_network_is_a_clear_error(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match=r"Salesforce/wikitext: could not be had .*\(ConnectionError: no route\).*local text file"
    ):
        read_text("wikitext2", "evaluation")


def test_data_sets_by_their_published_names(monkeypatch):
    import datasets

    calls = []

    def recorded(path, split, **arguments):
        calls.append((path, split, arguments))
        return {"text": ["one", "two"]}

    monkeypatch.setattr(datasets, "load_dataset", recorded)
    assert read_text("wikitext2", "evaluation").documents == ("one\n\ntwo",)
    assert read_text("wikitext2", "calibration").running
    assert read_text("c4", "evaluation").documents == ("one", "two")
    assert [(name, split) for name, split, _ in calls] == [
        ("Salesforce/wikitext", "test"),
        ("Salesforce/wikitext", "train"),
        ("allenai/c4", "train"),
    ]
    assert "validation" in calls[2][2]["data_files"]
