"""The Typer application: commands and the options before them."""

from typing import Annotated

import typer

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

debug = False
"""Set by --debug: errors show their traceback."""

app = typer.Typer(
    name="cnnft",
    no_args_is_help=True,
    add_completion=False,
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
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    show_tracebacks: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Turn a pretrained CNN and a folder of images into a classifier you can use."""
    global debug
    debug = show_tracebacks


app.command("finetune")(finetune.command)
app.command("predict")(predict.command)
app.command("evaluate")(evaluate.command)
app.command("export")(export.command)
app.command("diff")(diff.command)
app.command("check")(check.command)
app.command("backbones")(backbones.command)
app.command("recipes")(recipes.command)
app.command("cache")(cache.command)
