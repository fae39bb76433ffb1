"""The Typer application: commands and the options before them."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cnnft import __version__
from cnnft.cli import (
    backbones,
    cache,
    check,
    diff,
    evaluate,
    export,
    finetune,
    predict,
    recipes,
)
from cnnft.config.panels import MAIN

debug = False
"""Set by --debug: errors show their traceback."""


class _Help:
    """`--help` without the types of switches, and `--help` itself in the first panel."""

    def get_params(self, ctx: Any) -> Any:
        parameters: Any = super().get_params(ctx)  # type: ignore[misc]
        panels = [getattr(parameter, "rich_help_panel", None) for parameter in parameters]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if parameter.name == "help":
                parameter.rich_help_panel = MAIN if MAIN in panels else None
        return parameters


class _Command(_Help, TyperCommand):
    pass


class _Group(_Help, TyperGroup):
    pass


app = typer.Typer(
    name="cnnft",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # `main` turns exceptions into sentences
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"cnnft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
    show_tracebacks: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Turn a pretrained CNN and a folder of images into a classifier you can use."""
    global debug
    debug = show_tracebacks


for _module in (finetune, predict, evaluate, export, check, diff, backbones, recipes, cache):
    app.command(_module.__name__.rpartition(".")[2], cls=_Command)(_module.command)
