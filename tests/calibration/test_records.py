"""JSON, CSV and Parquet files in the forms that data sets have."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sliderquant.calibration.records import Conversation
from sliderquant.calibration.text import read_text
from sliderquant.errors import InputError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]

CONVERSATION = Conversation(tuple(CHAT))


def read(path, content=None):
    if content is not None:
        path.write_text(content, encoding="utf-8", newline="")
    return read_text(str(path), "calibration")


@pytest.mark.parametrize(
    "content",
    [
        '["a", "b"]',
        '[{"text": "a"}, {"text": "b"}]',
        json.dumps([{"text": "a"}, {"text": "b"}], indent=2),
        '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}',
        '{"rows": [{"row_idx": 0, "row": {"text": "a"}}, {"row": {"text": "b"}}]}',
        '{"text": ["a", "b"]}',
        '{"text": {"0": "a", "1": "b"}}',
        '{"text": "a"}\n\n  \r\n{"text": "b"}\n',
        '{\n"text": "a"\n}\n{\n"text": "b"\n}\n',
        '"a"\n"b"\n',
        '\ufeff{"content": "a"}\n{"text": "b", "content": "x"}',
    ],
)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "D.NDJSON"])
def test_json_is_read_by_its_content(tmp_path, content, name):
    text = read(tmp_path / name, content)
    assert (text.documents, text.running) == (("a", "b"), False)


def test_only_line_feeds_end_lines(tmp_path):
    content = '{"text": "first"}\n{"text": "a\u2028b\x85c"}\n{"text": "d"}'
    assert read(tmp_path / "d.jsonl", content).documents == ("first", "a\u2028b\x85c", "d")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p ", "completion": "c"}, "p c"),
        ({"instruction": "i", "input": "", "output": "o"}, "i\n\no"),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\n\nn\n\no"),
        ({"question": "q", "answer": "a"}, "q\n\na"),
        ({"messages": CHAT}, CONVERSATION),
        (CHAT, CONVERSATION),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, CONVERSATION),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CONVERSATION),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]},
            Conversation((CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]})),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, CHAT[1]]}, CONVERSATION),
    ],
)  # fmt: skip
def test_records_in_the_usual_forms(tmp_path, record, expected):
    assert read(tmp_path / "d.jsonl", json.dumps(record)).documents == (expected,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ('{"text": "a"\n{"text": "b"}\n', "line 1 is not JSON"),
        ('{"text": "a"}\n{"text": "b', "line 2 is not JSON: Unterminated"),
        ('{"text": null}', 'line 1: "text" is null'),
        ('{"text": "a"}\n{"text": 5}', 'line 2: "text" is a number'),
        ('{"text": "a"}\n{"body": "b"}', "line 2 has the fields body; expected"),
        ('{"text": "a"}\n{"text": "b\\ud800"}', r"line 2: .* half of a surrogate pair"),
        ('{"messages": []}', "an empty list; expected a list of messages"),
        ('{"messages": [{"role": "user"}]}', 'message 0 has no "content"'),
        ('{"messages": [{"content": "x"}]}', 'message 0 has no "role"'),
        ("[1, 2]", "element 0 is a number"),
        ("[]", "no text in it"),
        ("{}", "has the fields none"),
        ("[" * 100_000, "nested too deeply"),
        ("plain words", "line 1 is not JSON"),
    ],
)
def test_broken_records_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path / "d.jsonl", content)


def test_tables(tmp_path):
    assert read(tmp_path / "c.csv", 'id,text\r\n1,"a, b\nc"\r\n2,d\r\n').documents == ("a, b\nc", "d")
    assert read(tmp_path / "c.tsv", "text\tid\na\t1\n").documents == ("a",)
    assert read(tmp_path / "long.csv", "text\n" + "x" * 200_000).characters == 200_000
    assert read(tmp_path / "mac.csv", "id,text\r1,a\r2,b\r").documents == ("a", "b")
    assert read(tmp_path / "comma.csv", "text\na,\nb, \n").documents == ("a", "b")
    with pytest.raises(InputError, match="line 3 has 3 fields, the header 1: put text"):
        read(tmp_path / "more.csv", "text\nHello\nHello, this, is lost\n")
    with pytest.raises(InputError, match="record that begins in line 3 is broken"):
        read(tmp_path / "open.csv", 'text\na\n"b\nc\n')
    with pytest.raises(InputError, match="header line names no column"):
        read(tmp_path / "no.csv", "a,b\n1,2\n")
    pq.write_table(pa.table({"n": [1, 2], "text": ["a", "b"]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").documents == ("a", "b")
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet").documents == (CONVERSATION,)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="has the columns body; expected"):
        read(tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "two.parquet")
    with pytest.raises(InputError, match="more than one column text"):
        read(tmp_path / "two.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    with pa.OSFile(str(tmp_path / "two.arrow"), "wb") as sink, pa.ipc.new_file(sink, twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(InputError, match="more than one column text"):
        read(tmp_path / "two.arrow")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="damaged or cut off"):
        read(tmp_path / "cut.parquet")
