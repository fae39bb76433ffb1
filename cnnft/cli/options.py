"""Options that several commands share."""

from typing import Annotated, Any

import typer

from cnnft.cli import console
from cnnft.config.choices import Layout as Layout_
from cnnft.config.choices import Precision as Precision_
from cnnft.config.options import metavar_of, option_of, shown_default, validate_value
from cnnft.config.panels import MACHINE, RUN
from cnnft.config.run import MachineConfig
from cnnft.config.schema import FIELDS, flag
from cnnft.config.texts import view_count
from cnnft.errors import UsageError


def with_default(help: str, default: str | None) -> str:
    """A help text (rich's markup) and the default; typer would show ours in parentheses."""
    return help if default is None else rf"{help} [dim]\[default: {default}][/dim]"


def as_for_finetune(name: str) -> Any:
    """The option of a setting that finetune has too."""
    field = FIELDS[name]
    switch = option_of(field).switch

    def validated(value: Any) -> Any:
        validate_value(field, field.default if value is None else value)
        return value

    return typer.Option(
        *([flag(name)] if switch else []),
        callback=validated,
        show_default=False,
        rich_help_panel=MACHINE if option_of(field).panel == MACHINE else None,
        metavar=metavar_of(field),
        help=with_default(option_of(field).help, None if switch else shown_default(field)),
    )


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


def _view_set(value: str) -> str:
    view_count(value)  # refuses what is none
    return value


def _set_quiet(value: bool) -> None:
    console.set_quiet(value)


def _json(panel: str | None = None) -> Any:
    help = "Print the results as one JSON document."
    return typer.Option("--json", rich_help_panel=panel, help=help)


def _quiet(panel: str | None = None) -> Any:
    help = "Show results, warnings and errors only."
    return typer.Option("--quiet", "-q", rich_help_panel=panel, callback=_set_quiet, help=help)


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="RUN|FILE", help="A run directory, or a file made by export."
    ),
]
Layout = Annotated[Layout_, as_for_finetune("layout")]
IncludeHidden = Annotated[bool, as_for_finetune("include_hidden")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="For an exported head: the weights of its backbone."),
]
_TTA = (
    "Test-time augmentation, averaging probabilities over views: none, hflip, five-crop, ten-crop, "
    "multiscale (50 views) or random:K"
)
Tta = Annotated[str, typer.Option(metavar="VIEWS", callback=_view_set, help=f"{_TTA}.")]
TtaOrAll = Annotated[
    str,
    typer.Option(
        metavar="VIEWS",
        callback=lambda value: value if value == "all" else _view_set(value),
        help=f"{_TTA}; all compares them.",
    ),
]
BatchSize = Annotated[
    Any,  # what `batch_size` makes of it
    typer.Option(
        metavar="N|auto",
        parser=batch_size,
        rich_help_panel=MACHINE,
        help="Images per forward pass, each with all its views; auto: by the memory.",
    ),
]
Precision = Annotated[
    Precision_,
    typer.Option(
        metavar="DTYPE",
        rich_help_panel=MACHINE,
        help="Mixed-precision dtype (autocast): float32, bfloat16 or float16; 16 bits are less "
        "exact.",
    ),
]
Workers = Annotated[int | None, as_for_finetune("workers")]
READ_TIMEOUT = MachineConfig.read_timeout
ReadTimeout = Annotated[float, as_for_finetune("read_timeout")]
Device = Annotated[str, as_for_finetune("device")]
Json = Annotated[bool, _json()]
Quiet = Annotated[bool, _quiet()]
MainJson = Annotated[bool, _json(RUN)]
MainQuiet = Annotated[bool, _quiet(RUN)]
