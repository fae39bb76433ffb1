"""cnnft backbones [PATTERN]: the networks that finetune takes."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from cnnft.cli import console, options
from cnnft.cli.tables import table
from cnnft.errors import UsageError

if TYPE_CHECKING:
    from cnnft.models.catalogue import Entry

_MOST_TAGS = 4  # on a terminal; --json has all


def command(
    pattern: Annotated[
        str,
        typer.Argument(metavar="PATTERN", help="Part of the name, or a pattern such as 'resnet*'."),
    ] = "*",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List backbones: their size, input, stages, and pretrained weights.

    From tables that ship with cnnft; --backbone takes any of the installed libraries.
    """
    from cnnft.models.catalogue import find, versions

    found = find(pattern)
    if not found:
        raise UsageError(f"no backbone matches {pattern!r}; cnnft backbones lists all")
    if json:
        console.result_json([dataclasses.asdict(entry) for entry in found])
        return
    head = ("name", "parameters", "input", "stages", "licence", "weights")
    console.result(table(head, map(_row, found), numbers=range(1, 4)))
    console.say(f"{len(found)} backbones of {versions()}; * marks weights that are on this machine")


def _row(entry: "Entry") -> tuple[str, ...]:
    licences = sorted({w.licence for w in entry.weights if w.licence})
    return (
        entry.name,
        "-" if entry.parameters is None else f"{entry.parameters / 1e6:.2f} M",
        "-" if entry.input_size is None else f"{entry.input_size} px",
        "-" if entry.stages is None else str(entry.stages),
        ", ".join(licences) or "-",
        f"not supported: {entry.refused}" if entry.refused else _tags(entry),
    )


def _tags(entry: "Entry") -> str:
    prefix = len(entry.name) + 1
    tags = [(w.name[prefix:] or w.name) + ("*" if w.local else "") for w in entry.weights]
    more = f", … {len(tags) - _MOST_TAGS} more" if len(tags) > _MOST_TAGS else ""
    return (", ".join(tags[:_MOST_TAGS]) + more) or "none"
