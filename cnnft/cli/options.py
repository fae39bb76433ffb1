"""Options that several commands share."""

from typing import Annotated, Any

import typer

from cnnft.cli import console
from cnnft.config.choices import Layout as Layout_
from cnnft.config.choices import Precision as Precision_
from cnnft.config.choices import TestTimeViews
from cnnft.config.options import option_of
from cnnft.config.panels import MAIN
from cnnft.config.schema import FIELDS
from cnnft.errors import UsageError


def _set_quiet(value: bool) -> None:
    console.set_quiet(value)


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="RUN|FILE", help="A run directory, or a file made by export."
    ),
]
Layout = Annotated[
    Layout_,
    typer.Option(help=option_of(FIELDS["layout"]).help),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="For a head file: the weights of its backbone."),
]
Tta = Annotated[
    TestTimeViews,
    typer.Option(
        help="Test-time augmentation: average the probabilities of several views.",
    ),
]


def batch_size(value: str | int | None) -> int | str | None:
    """Raises `UsageError`: neither auto nor a number of images."""
    if value is None or value == "auto":
        return value
    try:
        number = int(value)
    except ValueError as error:
        raise UsageError(f"--batch-size {value!r}: give a whole number, or auto") from error
    if number < 1:
        raise UsageError(f"--batch-size {number} is out of range: it must be at least 1")
    return number


BatchSize = Annotated[
    Any,  # what `batch_size` makes of it
    typer.Option(
        metavar="N|auto",
        parser=batch_size,
        help="Images that are computed at once, each with all its views; auto: what fits and is "
        "quick.",
    ),
]
Precision = Annotated[
    Precision_,
    typer.Option(help="Of what the network computes; 16 bits are less exact."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default="half of the processors, at most 8",
        help="Processes that load images.",
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to compute.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_set_quiet, help="No progress, only results."),
]
MainJson = Annotated[
    bool, typer.Option("--json", rich_help_panel=MAIN, help="Print one JSON document.")
]
MainQuiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        rich_help_panel=MAIN,
        callback=_set_quiet,
        help="No progress, only results.",
    ),
]
