"""cnnft backbones [PATTERN]: the networks that finetune takes."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.errors import UsageError

if TYPE_CHECKING:
    from cnnft.models.catalogue import Entry

_MOST_TAGS = 4  # on a terminal; --json has all


def command(
    pattern: Annotated[
        str, typer.Argument(help="Part of the name, or a pattern such as 'resnet*'.")
    ] = "*",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List backbones: their size, input, stages, and pretrained weights."""
    from cnnft.models.catalogue import find

    found = find(pattern)
    if not found:
        raise UsageError(f"no backbone matches {pattern!r}; cnnft backbones lists all")
    if json:
        console.result_json([dataclasses.asdict(entry) for entry in found])
        return
    console.result(_table(found))
    console.say(f"{len(found)} backbones; * marks weights that are on this machine")


def _table(found: "list[Entry]") -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in ("parameters", "input", "stages"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("licence")
    table.add_column("weights")
    for entry in found:
        licences = sorted({w.licence for w in entry.weights if w.licence})
        table.add_row(
            entry.name,
            "-" if entry.parameters is None else f"{entry.parameters / 1e6:.2f} M",
            "-" if entry.input_size is None else f"{entry.input_size} px",
            "-" if entry.stages is None else str(entry.stages),
            ", ".join(licences) or "-",
            f"not supported: {entry.refused}" if entry.refused else _tags(entry),
        )
    return table


def _tags(entry: "Entry") -> str:
    prefix = len(entry.name) + 1
    tags = [(w.name[prefix:] or w.name) + ("*" if w.local else "") for w in entry.weights]
    more = f", … {len(tags) - _MOST_TAGS} more" if len(tags) > _MOST_TAGS else ""
    return (", ".join(tags[:_MOST_TAGS]) + more) or "none"
