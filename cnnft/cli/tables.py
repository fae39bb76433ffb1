"""Tables for people; `--json` has the same for machines."""

from collections.abc import Container, Iterable, Sequence

from rich.table import Table
from rich.text import Text

from cnnft.cli.console import printable


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Container[int] = ()
) -> Table:
    """Columns under `head`, those of `numbers` aligned at the right; a row may end early.

    A cell is the printable text of its value; a `Text` stays as it is.
    """
    made = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        justify = "right" if place in numbers else "left"
        made.add_column(_cell(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text(printable(str(value)))
