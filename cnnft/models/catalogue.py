"""What backbones there are: `cnnft backbones`, without the libraries that build them.

tools/sweep.py writes both tables: catalogue.csv (parameters, input sizes and stages, by building
every network) and pretrained.csv (sets of weights, and where the hub libraries cache them).
"""

import csv
import fnmatch
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from cnnft.models.hub import Remote


@dataclass(frozen=True)
class Weights:
    """One set of pretrained weights of an architecture."""

    name: str
    """As --backbone takes it."""
    licence: str | None
    """None where the library does not say."""
    local: bool
    """Whether the file is on this machine already."""


@dataclass(frozen=True)
class Entry:
    """One architecture; None stands for what is not known."""

    name: str
    parameters: int | None
    input_size: int | None
    stages: int | None
    refused: str | None
    """Why cnnft cannot use it."""
    weights: tuple[Weights, ...]
    """The default first; none: it exists with random weights only."""


def find(pattern: str = "*") -> list[Entry]:
    """Entries whose name matches: a shell pattern, or a part of the name."""
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return [_entry(row) for row in _read("catalogue") if fnmatch.fnmatch(row["name"], pattern)]


def versions() -> str:
    """Of the libraries that the tables were made from."""
    return _text("pretrained").partition("\n")[0].removeprefix("# ")


def _entry(row: dict[str, str]) -> Entry:
    return Entry(
        name=row["name"],
        parameters=int(row["parameters"]) or None,
        input_size=int(row["input_size"]) or None,
        stages=int(row["stages"]) or None,
        refused=None if row["result"] == "ok" else row["result"],
        weights=tuple(_weights(of) for of in _pretrained().get(row["name"], [])),
    )


def _weights(row: dict[str, str]) -> Weights:
    """A row without a place, a URL or a repository, ships with cnnft."""
    remote = Remote(row["weights"], row["place"], tuple(row["files"].split()))
    local = not row["place"] or remote.cached() is not None
    return Weights(row["weights"], row["licence"] or None, local)


@cache
def _pretrained() -> dict[str, list[dict[str, str]]]:
    """Backbone -> its sets of weights."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in _read("pretrained"):
        found.setdefault(row["backbone"], []).append(row)
    return found


def _read(table: str) -> list[dict[str, str]]:
    lines = (line for line in _text(table).splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))


@cache
def _text(table: str) -> str:
    return (files("cnnft.models") / f"{table}.csv").read_text(encoding="utf-8")
