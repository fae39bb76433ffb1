"""The one mouth: results to standard output, everything else to standard error."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnnft import distributed

quiet = False
"""Set by --quiet: nothing but results, warnings and errors. Of several processes the main one
speaks, and whoever fails."""

_out = Console(
    highlight=False,
    markup=False,
    emoji=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() else 1000,  # a pipe does not fold lines
)
_err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def relay_logs() -> None:
    """What the library logs is said here; the hub's retries, which it would print, are not."""
    log = logging.getLogger("cnnft")
    log.handlers, log.level, log.propagate = [_Say()], logging.INFO, False
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its logger up when imported


def say(text: RenderableType = "", style: str | None = None) -> None:
    if not quiet and distributed.is_main:
        _err.print(text, style=style)


def warn(text: str) -> None:
    if distributed.is_main:
        _err.print(f"warning: {text}", style="yellow")


def error(text: str) -> None:
    if distributed.says_first(text):
        _err.print(f"error: {text}", style="bold red")


def result(what: RenderableType) -> None:
    if distributed.is_main:
        _out.print(what, soft_wrap=isinstance(what, str))


def result_json(value: object) -> None:
    result_text(json.dumps(value, indent=2, default=str) + "\n")


def result_text(text: str) -> None:
    """Exactly `text`."""
    if distributed.is_main:
        print(text, end="")


@contextmanager
def progress(*columns: str, **fields: Any) -> Iterator[Progress]:
    """A bar on standard error; invisible where that is no terminal, or with --quiet."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=_err,
        transient=True,
        disable=quiet or not distributed.is_main or not _err.is_terminal or "CI" in os.environ,
    ) as bar:
        yield bar
