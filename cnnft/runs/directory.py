"""Directories of runs: making one, replacing one, and the lock on the one that trains."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from cnnft.errors import CnnftError, UsageError
from cnnft.machine import distributed
from cnnft.machine.files import remove_unfinished

STATE = "state"
"""The folder in a run for what training needs to go on."""
CONFIG = "config.toml"
"""The file that makes a directory a run."""
WEIGHTS = "model.safetensors"
"""The file with which a run can be used."""

_log = logging.getLogger(__name__)


@contextmanager
def new_directory(runs_dir: Path, name: str, *, force: bool) -> Iterator[Path]:
    """`name`, or `name`-2, -3, ...; with `force` `name` itself.

    What `force` replaces is kept, hidden, until `forget_replaced`; within this nobody else replaces
    a run of that name. The main process makes the directory for all.

    Raises:
        UsageError: `force` would replace something that is no run.
        CnnftError: the directory cannot be made; the run to replace is being trained or replaced.
    """
    with ExitStack() as stack:

        def make() -> Path:
            try:
                runs_dir.mkdir(parents=True, exist_ok=True)
                if force and (runs_dir / name).exists():
                    stack.enter_context(_replacing(runs_dir / name))
                    _put_aside(runs_dir / name)
                return _make(runs_dir, name)
            except OSError as error:
                raise CnnftError(
                    f"{runs_dir}: a run cannot be made there ({error.strerror}); see --runs-dir"
                ) from error

        yield distributed.broadcast_from_main(make)


def _make(runs_dir: Path, name: str) -> Path:
    for number in count(1):
        path = runs_dir / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        if number > 1:
            _log.info("%s is there already: this run is %s", runs_dir / name, path)
        break
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """Of several processes that replace `path` at once, one does.

    Raises:
        CnnftError: another does.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    with file.open("a") as before:
        with suppress(Timeout):
            lock.acquire(blocking=False)
        # Whoever held it before may have removed the file, so that others lock a new one.
        if not lock.is_locked or not _is_still(file, before.fileno()):
            lock.release()
            raise CnnftError(f"{path} is being replaced by another process")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes it when it is released
            file.unlink()
        lock.release()


def _is_still(file: Path, opened: int) -> bool:
    return file.exists() and os.path.samestat(os.fstat(opened), file.stat())


def forget_replaced(path: Path) -> None:
    """The run at `path` can be used, so the one that it replaces is not needed any more."""
    shutil.rmtree(_replaced(path), ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else trains there meanwhile; a process that dies lets go.

    Raises:
        CnnftError: somebody does.
    """
    lock = _lock_of(path)
    distributed.broadcast_from_main(lambda: _acquire(lock, path))
    try:
        yield
    finally:
        lock.release()


def _lock_of(path: Path) -> BaseFileLock:
    return FileLock(path / STATE / "lock")


def _acquire(lock: BaseFileLock, path: Path) -> None:
    try:
        (path / STATE).mkdir(exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise CnnftError(f"{path} is being trained by another process") from error
    except OSError as error:
        raise CnnftError(f"{path} cannot be written ({error.strerror})") from error
    remove_unfinished(path)
    remove_unfinished(path / STATE)


def _put_aside(path: Path) -> None:
    if not path.exists():  # another process has replaced it just now
        return
    if not (path / CONFIG).is_file():
        if {entry.name for entry in path.iterdir()} <= {STATE}:
            raise CnnftError(
                f"{path} was just begun by another process, or by one that was killed: choose "
                "another --name, or delete it"
            )
        raise UsageError(f"--force would delete {path}, which is not a run: choose another --name")
    lock = _lock_of(path)
    _acquire(lock, path)  # nobody trains in it; not `locked`, as the main process is alone here
    lock.release()
    if (path / WEIGHTS).exists():
        forget_replaced(path)
    elif _replaced(path).exists():
        shutil.rmtree(path)  # it was to replace that one, and got no weights
        return
    path.rename(_replaced(path))
    _log.info("%s is kept as %s until the new run has weights", path, _replaced(path))


def _replaced(path: Path) -> Path:
    """Where the run lies that `path` replaces, until it has weights of its own."""
    return path.with_name(f".{path.name}.replaced")
