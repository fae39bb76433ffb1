"""The disk cache that runs share: its folder, its limit, and what is evicted first.

    ~/.cache/cnnft/KIND/NAME.safetensors    $CNNFT_CACHE is another folder
                        NAME.pixels         what some entries describe: raw bytes

An entry is its .safetensors file, which is written last and removed first: without it, the pixels
do not count. Whatever lies here can be computed again. Above the limit, the least recently used
goes. A file that a process has mapped into memory may be removed (Windows refuses).
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.machine import interruption
from cnnft.machine.files import remove_unfinished

LIMIT = 50.0
"""GB (10⁹ bytes) in all; $CNNFT_CACHE_LIMIT is another bound."""
DISK_SHARE = 0.5
"""Of the free disk may be filled by what is written next."""

_PIXELS = ".pixels"
_WAY_OUT = "CNNFT_CACHE=FOLDER is another place"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What is read and evicted together."""

    path: Path
    kind: str
    """The folder it lies in."""
    about: str
    bytes: int
    """The pixels beside it included."""
    used: datetime
    """Local time."""


def root() -> Path:
    """The folder of the cache: $CNNFT_CACHE, or in the user's folder for caches."""
    chosen = os.environ.get("CNNFT_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("cnnft", appauthor=False)


def pixel_file(path: Path) -> Path:
    """Beside the entry at `path`."""
    return path.with_suffix(_PIXELS)


def limit() -> int:
    """Bytes that all entries may have.

    Raises:
        UsageError: $CNNFT_CACHE_LIMIT is no such number.
    """
    given = os.environ.get("CNNFT_CACHE_LIMIT") or str(LIMIT)
    try:
        gigabytes = float(given)
        if not 0 <= gigabytes < float("inf"):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"CNNFT_CACHE_LIMIT {given!r:.100}: give a number of gigabytes, such as {LIMIT:g}"
        ) from error
    return int(gigabytes * 1e9)


def entries() -> list[Entry]:
    """All entries, the most recently used first."""
    found: list[Entry] = []
    for path in root().glob("*/*.safetensors"):
        try:
            status = path.stat()
        except OSError:  # it has just been removed
            continue
        size = status.st_size
        with suppress(OSError):
            size += pixel_file(path).stat().st_size
        used = datetime.fromtimestamp(status.st_mtime)
        found.append(Entry(path, path.parent.name, _about(path), size, used))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def _about(path: Path) -> str:
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("about", "")
    except (OSError, SafetensorError):
        return "damaged"


def mark_used(path: Path) -> None:
    """It is evicted last."""
    with suppress(OSError):  # the folder may be somebody else's
        os.utime(path)


def refusal(needed: int) -> str | None:
    """Why there is no room for `needed` more bytes, or None; older entries would be evicted."""
    most = limit()
    if needed > most:
        return f"the cache may have {gigabytes(most)} (CNNFT_CACHE_LIMIT)"
    try:
        require_folder()
    except CnnftError as error:
        return str(error)
    room = int(DISK_SHARE * shutil.disk_usage(root()).free)
    return f"{DISK_SHARE:.0%} of the free disk is {gigabytes(room)}" if needed > room else None


def require_folder() -> None:
    """Make the folder of the cache, and try whether files can be made there.

    Raises:
        CnnftError: they cannot.
    """
    folder = root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise CnnftError(f"{folder} is no folder for the cache; {_WAY_OUT}") from error
    except OSError as error:
        raise CnnftError(
            f"{folder} cannot be written ({error.strerror or first_line(error)}); {_WAY_OUT}"
        ) from error


@contextmanager
def writing(needed: int, *, wait: bool = True) -> Iterator[bool]:
    """Lock the cache for writing, and evict until there is room for `needed` bytes more.

    Gives whether it is locked: without `wait`, another process may hold the lock.

    Raises:
        CnnftError: the folder cannot be written to.
    """
    with _locked() as lock:
        if not lock.is_locked and wait:
            _log.info("waiting for another process that writes to %s", root())
            with interruption.waiting():
                lock.acquire()
        if lock.is_locked:
            _remove_unfinished()
            _evict(limit() - needed)
        yield lock.is_locked


def clear() -> list[Entry]:
    """Remove all entries, and return them.

    Raises:
        CnnftError: another process is writing to it; a file cannot be removed.
    """
    if not root().exists():
        return []
    with _locked() as lock:
        if not lock.is_locked:
            raise CnnftError(f"{root()} is being written to by another process: try again later")
        found = entries()
        _remove_unfinished()
        for entry in found:
            try:
                _remove(entry)
            except OSError as error:
                raise CnnftError(f"{entry.path} cannot be removed ({error.strerror})") from error
    return found


def gigabytes(count: int) -> str:
    """In words; small amounts in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def _locked() -> Iterator[FileLock]:
    """The lock of the folder, acquired unless another process has it."""
    require_folder()
    lock = FileLock(root() / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pass
    except OSError as error:
        raise CnnftError(f"{lock.lock_file} cannot be locked ({first_line(error)})") from error
    try:
        yield lock
    finally:
        lock.release()


def _remove_unfinished() -> None:
    """What processes left that were killed while they wrote: for the one that writes now."""
    for kind in root().iterdir():
        if kind.is_dir():
            remove_unfinished(kind)
            for pixels in kind.glob(f"*{_PIXELS}"):
                if not pixels.with_suffix(".safetensors").exists():
                    with suppress(OSError):  # Windows, and in use
                        pixels.unlink(missing_ok=True)


def _remove(entry: Entry) -> None:
    entry.path.unlink(missing_ok=True)
    pixel_file(entry.path).unlink(missing_ok=True)


def _evict(most: int) -> None:
    """Remove the least recently used entries until at most `most` bytes are left."""
    total = 0
    for entry in entries():
        total += entry.bytes
        if total > most:
            try:
                _remove(entry)
                _log.info("removed %s from the cache, to make room", entry.about or entry.path.name)
            except OSError:  # Windows, and in use
                continue
