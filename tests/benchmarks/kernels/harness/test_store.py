"""Result files: resuming, and what is left when a run is killed."""

import json

import pytest

from benchmarks.kernels.harness.figures import row_key
from benchmarks.kernels.harness.store import Store, load


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cpu" / "kernels-test.json"


def _row(provider="ours", m=1, **more):
    case = {"op": "linear", "layer": "", "shape": "8x8", "m": m, "scheme": "W4", "dtype": "bf16"}
    return {**case, "provider": provider, "kind": "time", "status": "ok", "q50_us": 1.23456789, **more}


def _filled(path, *rows, version="1"):
    store = Store(path)
    store.begin({"date": "today"})
    for row in rows:
        store.add(row, version)
    return store


def test_rows_of_the_same_version_are_kept(path):
    _filled(path, _row(), _row(m=2)).write([])
    again = Store(path)
    assert again.has(row_key(_row(m=2)), "1")
    assert not again.has(row_key(_row(m=2)), "2")
    assert not again.has(row_key(_row(m=4)), "1")
    assert not again.has(row_key(_row("other")), "1")
    assert not again.has(row_key(_row(kind="check")), "1")


@pytest.mark.parametrize(("status", "kept"), [("ok", True), ("unsupported", True), ("error", False)])
def test_errors_are_tried_again(path, status, kept):
    _filled(path, _row(status=status, error="because")).write([])
    assert Store(path).has(row_key(_row()), "1") is kept


def test_a_killed_run_loses_only_the_row_that_was_being_made(path):
    _filled(path, _row()).write([])
    killed = _filled(path, _row(m=2), _row(m=4))  # never written
    with killed.journal.open("a") as file:
        file.write('{"row": {"op": "linear", "m": 8, "torn')
    again = Store(path)
    assert [row["m"] for row in again.rows] == [1, 2, 4]
    assert [run["id"] for run in again.runs] == [0, 1]
    # What was in the journal is in the file by now, and a further kill loses none of it.
    assert [row["m"] for row in load(path)["rows"]] == [1, 2, 4]
    again.begin({"date": "later"})
    again.add(_row(m=16), "1")
    assert [row["m"] for row in Store(path).rows] == [1, 2, 4, 16]
    assert [row["run"] for row in Store(path).rows] == [0, 1, 1, 2]


def test_the_file_is_replaced_as_a_whole(path, monkeypatch):
    store = _filled(path, _row())
    store.write([])
    before = path.read_bytes()
    store.add(_row(m=2), "1")
    monkeypatch.setattr("benchmarks.kernels.harness.store._rounded", lambda entry: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.write([])
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert [row["m"] for row in Store(path).rows] == [1, 2]


def test_a_newer_row_replaces_the_older_one(path):
    _filled(path, _row(q50_us=1.0), _row(m=2)).write([])
    _filled(path, _row(q50_us=2.0), version="2").write([])
    rows = load(path)["rows"]
    assert [(row["m"], row["q50_us"], row["version"], row["run"]) for row in rows] == [
        (1, 2.0, "2", 1),
        (2, 1.2346, "1", 0),
    ]


def test_runs_without_rows_leave(path):
    _filled(path, _row()).write([])
    _filled(path, _row(), version="2").write([])
    assert [run["id"] for run in load(path)["runs"]] == [1]


def test_fresh_forgets_everything(path):
    _filled(path, _row()).write([])
    _filled(path, _row(m=2))
    assert Store(path, fresh=True).rows == []
    assert not path.with_suffix(".journal").exists()


def test_forget_drops_rows(path):
    store = _filled(path, _row(), _row("gone"))
    store.forget(lambda row: row["provider"] == "gone")
    store.write([])
    assert [row["provider"] for row in load(path)["rows"]] == ["ours"]


def test_the_file_is_tidy(path):
    store = _filled(path, _row(relative_error=float("nan")), _row(m=2))
    store.update(seconds=1.5)
    store.write([{"text": "fast", "passed": None}])
    lines = path.read_text().splitlines()
    assert len([line for line in lines if '"provider"' in line]) == 2
    content = json.loads(path.read_text())
    assert content["schema"] == 1
    assert content["runs"] == [{"id": 0, "date": "today", "seconds": 1.5}]
    assert content["goals"] == [{"text": "fast", "passed": None}]
    assert content["rows"][0]["relative_error"] is None
    assert content["rows"][1]["q50_us"] == 1.2346
    assert not path.with_suffix(".journal").exists()


def test_what_follows_from_rows_is_not_read_back(path):
    store = _filled(path, _row())
    store.write([], [{**row, "ratio_to_16bit": 9.0} for row in store.rows])
    assert json.loads(path.read_text())["rows"][0]["ratio_to_16bit"] == 9.0
    assert "ratio_to_16bit" not in Store(path).rows[0]


def test_another_schema_is_an_error(path):
    path.parent.mkdir()
    path.write_text('{"schema": 7, "rows": []}')
    with pytest.raises(ValueError, match=r"expected schema 1, got 7; measure again with --fresh"):
        Store(path)


def test_rows_need_a_run(path):
    with pytest.raises(RuntimeError, match="begin a run"):
        Store(path).add(_row(), "1")
