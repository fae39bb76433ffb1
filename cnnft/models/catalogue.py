"""What backbones there are: `cnnft backbones` without building one.

Parameters, input sizes and stages come from catalogue.csv, which tools/sweep.py writes by building
every network; what a newer timm has besides is listed without them.
"""

import csv
import fnmatch
import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import timm

from cnnft.errors import CnnftError
from cnnft.models.registry import names, remote_weights, resolve


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
    return [_entry(name) for name in ["builtin", *names()] if fnmatch.fnmatch(name, pattern)]


def _entry(name: str) -> Entry:
    if name == "builtin":
        return Entry(name, *_measured()[name], (Weights(name, "apache-2.0", local=True),))
    measured = _measured().get(name, (None, None, None, None))
    return Entry(name, *measured, tuple(_weights(full) for full in _tagged(name)))


@cache
def _measured() -> dict[str, tuple[int | None, int | None, int | None, str | None]]:
    text = (files("cnnft.models") / "catalogue.csv").read_text(encoding="utf-8")
    return {
        row["name"]: (
            int(row["parameters"]) or None,
            int(row["input_size"]) or None,
            int(row["stages"]) or None,
            None if row["result"] == "ok" else row["result"],
        )
        for row in csv.DictReader(io.StringIO(text))
    }


def _tagged(name: str) -> list[str]:
    """Full names of the pretrained weights of an architecture, the default first."""
    if name.startswith("torchvision/"):
        from torchvision.models import get_model_weights

        options = get_model_weights(name.removeprefix("torchvision/"))
        found = [f"{name}@{option.name}" for option in options]
        default = f"{name}@{options['DEFAULT'].name}"
    else:
        found = _timm_weights().get(name, [])
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        default = f"{name}.{config.tag}" if config is not None and config.tag else name
    return sorted(found, key=lambda full: full != default)


@cache
def _timm_weights() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        found.setdefault(full.partition(".")[0], []).append(full)
    return found


def _weights(full: str) -> Weights:
    try:
        identity = resolve(full)
        licence = identity.pretrained_cfg.get("license")
        return Weights(full, licence, remote_weights(identity).cached() is not None)
    except CnnftError:
        return Weights(full, None, local=False)
