"""The folder that a checkpoint is written to before it is visible, and how it becomes visible.

    .OUT.partial-1a2b3c4d/
        .sliderquant-run    names the run that writes it; the run holds a lock on this file
        checkpoint/         what will be OUT
        old/                what was OUT, while the new one takes its place

It lies next to OUT, which one rename makes of `checkpoint`. Where that cannot be (OUT is there and empty, and keeps its
owner and mode; it is a mount point; its parent is not writable), it lies in OUT, and the files move up at the end,
config.json last: without it nothing takes the folder for a checkpoint.

By the lock, what a killed run left is told from what a live run is writing.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from sliderquant.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Staging", "resolved", "sync"]

logger = logging.getLogger(__name__)

_MARKER, _NEW, _OLD = ".sliderquant-run", "checkpoint", "old"
_LONGEST_NAME = 200
# A folder cannot be renamed: onto another device, off a mount point, in a parent that is not ours.
_CANNOT_RENAME = (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL)


def resolved(out: str | Path) -> Path:
    """The folder that `out` means, through symbolic links. Raises InputError when there is no way to it."""
    try:
        path = Path(out).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise InputError(f"{out}: cannot write there: {getattr(error, 'strerror', None) or error}") from error
    return path


class Staging:
    """Where the checkpoint `out` is written, and all that is left to clean up when it is not finished."""

    def __init__(self, out: Path) -> None:
        """Choose the place, and check that it can be written to; nothing is made.

        Raises:
            InputError: the place is not writable.
        """
        self.out = out
        self.inside = out.is_dir() and (
            not self.visible() or out.is_mount() or not os.access(out.parent, os.W_OK | os.X_OK)
        )
        self.parent = out if self.inside else out.parent
        self._run: Path | None = None
        self._lock: IO[str] | None = None
        there = next(path for path in (self.parent, *self.parent.parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"{out}: cannot write there: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{out}: cannot write there: no permission to write in {there}")

    def make(self) -> Path:
        """Make the folder, with the mode that the umask and the parent give it, after what killed runs left is gone.

        Raises:
            InputError: it cannot be made.
        """
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            self._run = self.parent / f"{self._prefix}{secrets.token_hex(4)}"
            self._run.mkdir()
            self._lock = _marked(self._run / _MARKER, self.out)
            folder = self._run / _NEW
            folder.mkdir()
        except OSError as error:
            self.remove()
            raise InputError(f"{self.out}: cannot write there: {error.strerror}") from error
        return folder

    def remove(self) -> None:
        """Remove what was written and is not visible; after `publish`, what it replaced."""
        if self._run is not None:
            if _interrupted(self._run):
                logger.warning("%s holds what was in %s and could not be moved back", self._run / _OLD, self.out)
            else:
                shutil.rmtree(self._run, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        self._run = self._lock = None

    def publish(self) -> None:
        """Make the folder visible as `out`; what is there steps aside first and comes back if that fails."""
        assert self._run is not None
        new, old = self._run / _NEW, self._run / _OLD
        if self.inside:
            self._exchange(new, old)
        else:
            try:
                self._rename(new, old)
            except OSError as error:
                if error.errno not in _CANNOT_RENAME:
                    raise
                self._exchange(new, old)
        sync(self.out.parent)
        self.remove()

    def _rename(self, new: Path, old: Path) -> None:
        try:
            if self.out.exists():
                # A folder that its owner closed to others stays closed.
                new.chmod(stat.S_IMODE(self.out.stat().st_mode))
                os.rename(self.out, old)
            os.rename(new, self.out)
        except BaseException:
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)
            raise

    def _exchange(self, new: Path, old: Path) -> None:
        """Move the files one by one; `out` itself stays, with its owner and mode."""
        made = not self.out.exists()
        if made:
            self.out.mkdir()
        old.mkdir()
        moves = [(path, old) for path in sorted(self.visible(), key=_config_first)]
        moves += [(path, self.out) for path in sorted(new.iterdir(), key=_config_first, reverse=True)]
        moved: list[tuple[Path, Path]] = []
        try:
            for path, into in moves:
                moved.append((path, into / path.name))
                shutil.move(path, into / path.name)
        except BaseException:
            for path, target in reversed(moved):
                if target.exists() and path.exists():  # copied, perhaps in part, and not removed
                    shutil.rmtree(target) if target.is_dir() else target.unlink()
                elif target.exists():
                    shutil.move(target, path)
            old.rmdir()
            if made:
                self.out.rmdir()
            raise
        new.rmdir()
        sync(self.out)

    def visible(self) -> list[Path]:
        """What is in `out`, but for the folders that runs are writing."""
        return [path for path in self.out.iterdir() if not path.name.startswith(self._prefix)]

    @property
    def _prefix(self) -> str:
        name = self.out.name
        while len(os.fsencode(name)) > _LONGEST_NAME:
            name = name[:-1]
        return f".{name}.partial-"

    def _clear_leftovers(self) -> None:
        """Remove what killed runs of this `out` left, and say so; name what may be something else."""
        # Not glob: a name may hold its special characters.
        for path in sorted(self.parent.iterdir()):
            if not path.name.startswith(self._prefix) or not path.is_dir():
                continue
            state = _state(path / _MARKER, self.out)
            if state == "running":
                logger.warning("another run is writing to %s right now, in %s", self.out, path)
            elif state == "unknown":
                logger.warning("%s may be left from a run that was killed: remove it if none is writing to it", path)
            elif _interrupted(path):
                logger.warning(
                    "%s holds what a run was replacing when it was killed: move it to %s, or remove it",
                    path / _OLD,
                    self.out,
                )
            else:
                shutil.rmtree(path, ignore_errors=True)
                logger.warning("removed %s, which a run that was killed had left", path)


def _interrupted(run: Path) -> bool:
    """Whether a run moved the old checkpoint aside and not yet all of the new one to its place."""
    return (run / _OLD).is_dir() and any((run / _OLD).iterdir()) and (run / _NEW).is_dir()


def _config_first(path: Path) -> tuple[bool, str]:
    return path.name != "config.json", path.name


def _marked(path: Path, out: Path) -> IO[str]:
    """The marker of a run, locked for as long as it is open."""
    file = path.open("w+", encoding="utf-8")
    if fcntl is not None:
        with suppress(OSError):  # this file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
    # Locked before it says anything: an empty marker counts as that of nobody.
    json.dump({"out": str(out), "host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
    return file


def _try_lock(file: IO[str]) -> bool | None:
    """Whether the lock could be taken; None: this file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _state(marker: Path, out: Path) -> str:
    """`running`, `dead`, or `unknown`: of another output, without a marker, of another machine, without locks."""
    try:
        with marker.open("r+", encoding="utf-8") as file:
            locked = _try_lock(file)
            described = json.load(file)
    except (OSError, ValueError):
        return "unknown"
    if locked is False:
        return "running"
    ours = isinstance(described, dict) and described.get("out") == str(out)
    # Over a network a lock may be known to one machine only, and without locks a process is known only there.
    if not ours or described.get("host") != socket.gethostname() or not isinstance(described.get("pid"), int):
        return "unknown"
    if _alive(described["pid"]):  # or its number is that of a later process by now
        return "running" if locked is None else "unknown"
    return "dead"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Write a file or folder to the disk, where the file system and our rights allow it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)
