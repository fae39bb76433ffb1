"""Files that are whole: they appear at once, or not at all; JSON and CSV, also of somebody else."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cnnft.errors import CnnftError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_DEEPEST = 50
"""Levels of JSON: what cnnft and timm write has a tenth; Python's own recursion must bear it."""

_UNFINISHED = ".unfinished"


def to_safetensors(state: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save  # and torch, which takes a second

    return bytes(save({k: v.detach().cpu().contiguous() for k, v in state.items()}, metadata))


def parse_json(content: str | bytes, source: str | Path) -> dict[str, Any]:
    """The object that `content` holds.

    Raises:
        CnnftError: it is no JSON, nested without end, or no object.
    """
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        if _is_deep(value):
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        json.dumps(value, ensure_ascii=False).encode()  # not every text can be written again
    except (ValueError, RecursionError) as error:
        kind = kind_of(content.encode(errors="replace") if isinstance(content, str) else content)
        odd = kind is not None and "JSON" not in kind and "text" not in kind
        reason = f"it is {kind}" if odd else first_line(error)
        raise CnnftError(f"{source} is damaged ({reason})") from error
    return value


_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches the file itself"),
    (b"<!doctype html", "a web page, as a failed download leaves it"),
    (b"<html", "a web page, as a failed download leaves it"),
    (b"<?xml", "an XML file"),
    (b"pk\x03\x04", "a zip archive, or what PyTorch saves"),
    (b"\x80\x02", "a pickle, or what old PyTorch saves"),
    (b"\x80\x04", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89png", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"\x89hdf", "an HDF5 file, as Keras saves"),
    (b"{", "a JSON file"),
    (b"[", "a JSON file"),
)
"""What files begin with, in lower case and after white space."""
_BEGINNING = 1000  # bytes of a file that tell what it is


def kind_of(content: bytes) -> str | None:
    """What a file that begins so is, for the sentence why it cannot be read; None: who knows."""
    if not content:
        return "empty"
    if content[4:8] == bytes(4):  # the length of a safetensors header, whatever that begins with
        return None
    start = content[:_BEGINNING].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _KINDS:
        if start.startswith(beginning):
            return kind
    with suppress(UnicodeDecodeError):
        # The last character may be cut.
        text = content[: _BEGINNING - 4].decode() if len(start) > 4 else start.decode()
        return "a text file" if all(c.isprintable() or c.isspace() for c in text) else None
    return None


def kind_of_file(path: Path) -> str | None:
    """`kind_of` what the file holds; None as well where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return kind_of(file.read(_BEGINNING))
    return None


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the dataclass `cls` has fields for; a newer cnnft may have written more."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def to_csv(header: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    """UTF-8; file names that are not keep their bytes, and cells may hold line breaks."""
    text = "".join(map(csv_line, chain([header], rows)))
    return text.encode("utf-8", errors="surrogateescape")


def csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO(newline="")
    # Before Python 3.13 a carriage return in a cell is quoted only where it ends lines.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def read_csv(file: IO[bytes]) -> Iterator[list[str]]:
    """The rows of what `to_csv` wrote, its header first.

    Raises:
        ValueError: a row has more cells than the header, or fewer.
    """
    width = None
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    try:
        for row in csv.reader(text):
            width = len(row) if width is None else width
            if len(row) != width:
                raise ValueError("a row is not whole")
            yield row
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        containers = [node for node in level if isinstance(node, dict | list)]
        level = [x for c in containers for x in (c.values() if isinstance(c, dict) else c)]
    return bool(level)


def write_whole(path: Path, content: bytes) -> None:
    """`content` becomes `path` as `whole_file` has it.

    Raises:
        CnnftError: the disk is full, or the place cannot be written to.
    """
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[IO[bytes]]:
    """`write_whole` for what comes in pieces.

    Raises:
        CnnftError: alike.
    """
    with _writing(path):
        if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
            with path.open("wb") as file:
                yield file
        else:
            with whole_file(path, 0o666 & ~_umask()) as file:
                yield file


@contextmanager
def whole_file(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file beside `path`; at the end it is synced, gets its mode, and is renamed to `path`.

    A crash leaves the old file or the new one, whole; an exception the old one.

    Raises:
        CnnftError: the disk is full, or the place cannot be written to.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CnnftError(f"{path} cannot be written ({error.strerror})") from error


def remove_unfinished(folder: Path) -> None:
    """What `write_whole` left in `folder` when its process was killed, while nobody writes now."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
