"""The one mouth: results to standard output, everything else to standard error and to a log."""

import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnnft.machine import distributed

if TYPE_CHECKING:
    from cnnft.data.dataset import Skipped

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


_unwritten: list[str] = []
"""Lines of the log that wait for its file."""
_log: Path | None = None


def begin(arguments: list[str]) -> None:
    """A command begins: its log holds what is said from here on, if it will have one."""
    global _log
    _log = None
    _unwritten[:] = [_stamped(shlex.join(["cnnft", *arguments]))] if distributed.is_main else []


def log_to(path: Path, environment: str) -> None:
    """Append what was said so far to `path`, below `environment`, and all that will be said."""
    global _log
    _log = path
    if distributed.is_main:
        _unwritten[0] += f"  ({environment})"
    _write_log()


def note(what: RenderableType) -> None:
    """For the log alone."""
    text = io.StringIO()
    plain = Console(file=text, width=120, color_system=None, force_terminal=False, soft_wrap=True,
                    highlight=False, markup=False, emoji=False)  # fmt: skip
    plain.print(what)
    _unwritten.extend(_stamped(line) for line in text.getvalue().splitlines() if line.strip())
    _write_log()


def _stamped(line: str) -> str:
    return f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {line.rstrip()}"


def _write_log() -> None:
    if _log is None:
        return
    # A full disk loses lines of the log: nothing that is worth the run.
    with suppress(OSError), _log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in _unwritten)
    _unwritten.clear()


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        elif record.levelno >= logging.INFO:
            say(printable(record.getMessage()))
        else:
            note(printable(record.getMessage()))


def relay_logs() -> None:
    """What the library logs is said here; the hub's retries, which it would print, are not."""
    log = logging.getLogger("cnnft")
    log.handlers, log.level, log.propagate = [_Say()], logging.DEBUG, False
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its logger up when imported


def say(text: RenderableType = "", style: str | None = None) -> None:
    if not distributed.is_main:
        return
    note(text)
    if not quiet:
        _err.print(text, style=style)


def warn(text: str) -> None:
    if distributed.is_main:
        note(f"warning: {printable(text)}")
        _err.print(f"warning: {printable(text)}", style="yellow")


def warn_of_skipped(files: Sequence["Skipped"], elsewhere: str) -> None:
    """A line for each of the first files and a count; `elsewhere` is about the rest."""
    most = 10
    for file in files[:most]:
        warn(f"skipped {file.path}: {file.reason}")
    if files:
        warn(f"{len(files)} file(s) skipped" + (f": {elsewhere}" if len(files) > most else ""))


def error(text: str) -> None:
    note(f"error: {printable(text)}")
    if distributed.says_first(text):
        _err.print(f"error: {printable(text)}", style="bold red")


def printable(text: str) -> str:
    """In one line, and harmless: names of files may hold line breaks and a terminal's commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
def progress(*columns: str, beside_results: bool = False) -> Iterator[Progress]:
    """A bar on standard error; invisible where that is no terminal, or with --quiet.

    `beside_results`: results are printed meanwhile; on the same terminal they are progress enough.
    """
    shown = _err.is_terminal and not (beside_results and _out.is_terminal)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=_err,
        transient=True,
        disable=quiet or not distributed.is_main or not shown or "CI" in os.environ,
    ) as bar:
        yield bar


def reading_images(bar: Progress) -> Callable[[int, int | None], None]:
    """Shows a count of the images that were found, then a bar of those that were checked."""
    finding = bar.add_task("finding images", total=None)
    checking = bar.add_task("checking the images", total=None, visible=False)

    def show(count: int, total: int | None) -> None:
        if total is None:
            bar.advance(finding, count)
        else:
            bar.update(finding, visible=False)
            bar.update(checking, visible=True, total=total, advance=count)

    return show
