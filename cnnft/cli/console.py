"""The one mouth: results to standard output, everything else to standard error."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from cnnft.data import Skipped

quiet = False
"""Set by --quiet: nothing but results, warnings and errors."""

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
    if not quiet:
        _err.print(text, style=style)


def warn(text: str) -> None:
    _err.print(f"warning: {printable(text)}", style="yellow")


def warn_of_skipped(files: Sequence["Skipped"], elsewhere: str) -> None:
    """A line for each of the first files and a count; `elsewhere` is about the rest."""
    most = 10
    for file in files[:most]:
        warn(f"skipped {file.path}: {file.reason}")
    if files:
        warn(f"{len(files)} file(s) skipped" + (f": {elsewhere}" if len(files) > most else ""))


def error(text: str) -> None:
    _err.print(f"error: {printable(text)}", style="bold red")


def printable(text: str) -> str:
    """In one line, and harmless: names of files may hold line breaks and a terminal's commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def result(what: RenderableType) -> None:
    _out.print(what, soft_wrap=isinstance(what, str))


def result_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))


def result_text(text: str) -> None:
    """Exactly `text`."""
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
        disable=quiet or not _err.is_terminal or "CI" in os.environ,
    ) as bar:
        yield bar


@contextmanager
def reading_images() -> Iterator[Callable[[int, int | None], None]]:
    """A count of the images that were found, then a bar of those that were checked."""
    with progress() as bar:
        finding = bar.add_task("finding images", total=None)
        checking = bar.add_task("checking the images", total=None, visible=False)

        def show(count: int, total: int | None) -> None:
            if total is None:
                bar.advance(finding, count)
            else:
                bar.update(finding, visible=False)
                bar.update(checking, visible=True, total=total, advance=count)

        yield show
