"""Where a checkpoint is written, how it becomes visible, and what killed runs leave."""

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sliderquant.checkpoint import staging
from sliderquant.checkpoint.staging import Staging, resolved
from sliderquant.errors import InputError

KILLED = """
import os, signal, sys
from pathlib import Path
from sliderquant.checkpoint.staging import Staging
staging = Staging(Path(sys.argv[1]))
folder = staging.make()
(folder / "shard-00000").write_text("half")
print("ready", flush=True)
if sys.argv[2] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(out: Path, text: str = "new") -> None:
    made = Staging(out)
    folder = made.make()
    (folder / "templates").mkdir()
    (folder / "templates" / "a.jinja").write_text(text)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)
    made.publish()


NEW = {"config.json": "new", "model.safetensors": "new", "templates/a.jinja": "new"}


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def no_rename(monkeypatch):
    """Of folders: `no_rename(errno.EXDEV)`."""
    rename = os.rename

    def forbid(code):
        def renamed(source, target):
            if os.path.isdir(source):
                raise OSError(code, os.strerror(code))
            rename(source, target)

        monkeypatch.setattr(staging.os, "rename", renamed)

    return forbid


@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
@pytest.mark.parametrize("code", [None, errno.EXDEV, errno.EBUSY, errno.EACCES])
def test_publishing(tmp_path, no_rename, before, code):
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "old":
        (out / "config.json").write_text("old")
        (out / "extra").mkdir()
        (out / "extra" / "notes").write_text("old")
    if code is not None:
        no_rename(code)
    write(out)
    assert contents(out) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "templates"]


@pytest.mark.parametrize("failing", ["config.json", "model.safetensors", "templates"])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_failure_between_two_files_brings_the_old_ones_back(tmp_path, monkeypatch, no_rename, failing, before):
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "old":
        (out / "config.json").write_text("old")
        (out / "model.safetensors").write_text("old")
    no_rename(errno.EXDEV)
    move = shutil.move

    def moved(source, target):
        if Path(source).name == failing and Path(target).parent == out and Path(source).parent.name == "checkpoint":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(staging.shutil, "move", moved)
    target = Staging(out)
    folder = target.make()
    (folder / "templates").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("new")
    with pytest.raises(KeyboardInterrupt):
        target.publish()
    target.remove()
    if before == "nothing":
        assert not any(tmp_path.iterdir())
    else:
        assert contents(out) == ({"config.json": "old", "model.safetensors": "old"} if before == "old" else {})
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("setgid", [False, True])
def test_modes_are_those_of_the_umask(tmp_path, umask, setgid):
    parent = tmp_path / "parent"
    parent.mkdir()
    if setgid:
        parent.chmod(0o2775)
    os.umask(umask)
    write(parent / "out")
    wanted = 0o777 & ~umask | (stat.S_ISGID if setgid else 0)
    for folder in (parent / "out", parent / "out" / "templates"):
        assert stat.S_IMODE(folder.stat().st_mode) == wanted
    assert stat.S_IMODE((parent / "out" / "config.json").stat().st_mode) == 0o666 & ~umask


def test_an_empty_folder_keeps_its_mode_and_place(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    before = out.stat()
    write(out)
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("reason", ["mount point", "parent"])
def test_written_inside_where_the_folder_cannot_be_replaced(tmp_path, monkeypatch, reason):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    if reason == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    else:
        monkeypatch.setattr(staging.os, "access", lambda path, mode: path != tmp_path)
    assert Staging(out).parent == out
    write(out)
    assert contents(out) == NEW


def test_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "dangling"):
        write(resolved(f"{tmp_path / name}/"))
        assert (tmp_path / name).is_symlink()
        assert contents(tmp_path / name) == NEW
    if sys.version_info < (3, 13):  # later ones resolve a loop to itself
        with pytest.raises(InputError, match="cannot write there"):
            resolved(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot write there"):
        resolved(tmp_path / ("x" * 300))


def test_a_long_name(tmp_path):
    write(tmp_path / ("ü" * 120))
    assert contents(tmp_path / ("ü" * 120)) == NEW


def test_a_place_that_is_not_writable_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(staging.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot write there: no permission to write in"):
        Staging(tmp_path / "a" / "out")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def other_run(monkeypatch):
    """`other_run(out, "die" or "live")`: another process that writes to `out`."""
    runs = []

    def start(out, kind):
        command = [sys.executable, "-c", KILLED, str(out), kind]
        runs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert runs[-1].stdout.readline() == "ready\n"
        if kind == "die":
            runs[-1].wait()

    yield start
    for run in runs:
        run.stdin.close()
        run.wait()
        run.stdout.close()


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_killed_run_left_is_removed_and_named(tmp_path, other_run, caplog, inside):
    out = tmp_path / "out"
    if inside:
        out.mkdir()
    other_run(out, "die")
    (left,) = (out if inside else tmp_path).glob(".out.partial-*")
    write(out)
    assert contents(out) == NEW
    assert not left.exists()
    assert f"removed {left}, which a run that was killed had left" in caplog.text


def test_what_a_live_run_is_writing_stays(tmp_path, other_run, caplog):
    out = tmp_path / "out"
    other_run(out, "live")
    (running,) = tmp_path.glob(".out.partial-*")
    write(out)
    assert (running / "checkpoint" / "shard-00000").exists()
    assert "another run is writing" in caplog.text


@pytest.mark.parametrize("kind", ["no marker", "other output", "other machine", "live process", "old checkpoint"])
def test_what_is_not_certainly_rubbish_stays_and_is_named(tmp_path, other_run, caplog, monkeypatch, kind):
    out = tmp_path / "out"
    other_run(out, "die")
    (left,) = tmp_path.glob(".out.partial-*")
    if kind == "no marker":
        (left / ".sliderquant-run").unlink()
    elif kind == "other output":
        (left / ".sliderquant-run").write_text('{"out": "/elsewhere"}')
    elif kind == "live process":
        text = (left / ".sliderquant-run").read_text()
        (left / ".sliderquant-run").write_text(json.dumps({**json.loads(text), "pid": os.getpid()}))
    elif kind == "other machine":
        monkeypatch.setattr(staging.socket, "gethostname", lambda: "another")
    else:
        (left / "old").mkdir()
        (left / "old" / "config.json").write_text("old")
    caplog.set_level(logging.WARNING)
    write(out)
    assert left.exists()
    assert str(left) in caplog.text


def test_a_folder_that_is_closed_to_others_stays_closed(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    out.chmod(0o700)
    write(out)
    assert contents(out) == NEW
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
