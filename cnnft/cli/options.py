"""Options that several commands share."""

from typing import Annotated

import typer

from cnnft.cli import console
from cnnft.config import TestTimeViews


def _set_quiet(value: bool) -> None:
    console.quiet = value


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="RUN|FILE", help="A run directory, or a file made by export."
    ),
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
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images that are computed at once, each with all its views.")
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
