"""The files of a run, each with the version of its format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from cnnft.errors import CnnftError, first_line
from cnnft.machine import distributed
from cnnft.machine.files import write_whole
from cnnft.runs.formats import FORMATS, formats_from_json

T = TypeVar("T")


@dataclass(frozen=True)
class RunFiles:
    """Reads and writes them whole."""

    path: Path

    def _read_if_there(self, name: str, parse: Callable[[IO[bytes]], T]) -> T | None:
        return self._read(name, parse) if (self.path / name).exists() else None

    def _read(self, name: str, parse: Callable[[IO[bytes]], T]) -> T:
        """Raises `CnnftError`: the file is not there, damaged, or of a newer format."""
        self._require_known(name)
        path = self.path / name
        try:
            with path.open("rb") as file:
                return parse(file)
        except OSError as error:
            raise CnnftError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CnnftError(f"{path} is damaged ({first_line(error)})") from error

    def _require_known(self, name: str) -> int:
        """The version of a file's format, 1 where formats.json is absent.

        Raises:
            CnnftError: it is a newer one.
        """
        if name not in FORMATS or not (self.path / "formats.json").exists():
            return 1
        version, formats = self._read("formats.json", formats_from_json)
        found = formats.get(name, 1)
        if found > FORMATS[name]:
            raise CnnftError(f"{self.path / name} was written by cnnft {version}: update cnnft")
        return found

    def _write(self, name: str, content: bytes) -> None:
        if distributed.is_main:
            write_whole(self.path / name, content)
