"""The one mouth: results to standard output, everything else to standard error and to a log.

What is said passes through the logger "cnnft", as what the library logs does; one handler shows it
and another one writes it into the run's log.
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnnft.errors import CnnftError
from cnnft.errors import printable as printable
from cnnft.machine import distributed

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
# A pipe does not fold lines; a closed standard output is None.
_out = Console(**_PLAIN, width=None if sys.stdout and sys.stdout.isatty() else 1000)
screen = Console(**_PLAIN, stderr=True)
"""Standard error."""
_page = Console(**_PLAIN, width=120, color_system=None, force_terminal=False)
"""For what is drawn into the log."""

_log = logging.getLogger("cnnft")
_FOR_MAIN_TO_SAY = 10.0  # seconds


def _spoken(record: logging.LogRecord) -> bool:
    """Of several processes the main one speaks, and whoever fails."""
    return distributed.is_main or record.levelno >= logging.ERROR


class _Screen(logging.Handler):
    """Shows what is said in the style of its level; INFO may be drawn, and have a style."""

    def emit(self, record: logging.LogRecord) -> None:
        drawn = getattr(record, "drawn", None)
        style = {logging.WARNING: "yellow", logging.ERROR: "bold red"}.get(record.levelno)
        what = _sentence(record) if drawn is None else drawn
        screen.print(what, style=getattr(record, "style", style))


class _LogFile(logging.FileHandler):
    terminator = ""  # `_Lines` ends its lines

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk loses lines of the log: nothing that is worth the run."""


class _Lines(logging.Formatter):
    """Every line with the time; a traceback above what is said of it."""

    def format(self, record: logging.LogRecord) -> str:
        drawn = getattr(record, "drawn", None)
        text = _sentence(record) if drawn is None else _as_text(drawn)
        if record.exc_info:
            text = f"{self.formatException(record.exc_info)}\n{text}"
        stamp = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
        lines = [line.rstrip() for line in text.splitlines()]
        return "".join(f"{stamp}  {line}\n" for line in lines if line)


def _sentence(record: logging.LogRecord) -> str:
    prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
    return prefix + printable(record.getMessage())


def _as_text(what: RenderableType) -> str:
    with _page.capture() as captured:
        _page.print(what)
    return captured.get()


_shown = _Screen()


@contextmanager
def speaking(arguments: list[str]) -> Iterator[None]:
    """A command runs: what it says is shown, and kept for its log, if it will have one."""
    before = _log.handlers[:], _log.level, _log.propagate
    waiting = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)  # until there is a file
    set_quiet(False)
    _log.handlers, _log.propagate = [_shown, waiting], False
    _log.setLevel(logging.DEBUG)
    for handler in _log.handlers:
        handler.addFilter(_spoken)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else the hub prints its retries
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch prints lost connections
    _log.debug("%s", shlex.join(["cnnft", *arguments]))
    try:
        yield
    finally:
        for handler in _log.handlers:
            with suppress(OSError):  # a full disk
                handler.close()
        _log.handlers, level, _log.propagate = before
        _log.setLevel(level)  # rather than assigned: loggers below it remember what is shown


def log_to(path: Path, environment: str) -> None:
    """Append what was said so far to `path`, below `environment`, and all that will be said."""
    waiting = _log.handlers[-1]
    assert isinstance(waiting, MemoryHandler)
    try:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return
    file.setFormatter(_Lines())
    file.addFilter(_spoken)
    if waiting.buffer:
        waiting.buffer[0].msg += f"  ({environment})"
    waiting.setTarget(file)
    waiting.close()
    _log.handlers[-1] = file


def set_quiet(quiet: bool) -> None:
    """With --quiet nothing but results, warnings and errors."""
    _shown.setLevel(logging.WARNING if quiet else logging.INFO)


def say(what: RenderableType = "", style: str | None = None) -> None:
    drawn = _printable_lines(what) if isinstance(what, str) else what
    _log.info("", extra={"drawn": drawn, "style": style})


def warn(text: str) -> None:
    _log.warning("%s", text)


def error(text: str, *, met_by_main: bool = False, traceback: bool = False) -> None:
    """What ends the command; the log has the `traceback` too.

    Of several processes the main one says what it meets too. torchrun ends the others when it has
    ended; should it not, they say it themselves.
    """
    if not distributed.is_main:
        if met_by_main:
            time.sleep(_FOR_MAIN_TO_SAY)
        text = f"rank {distributed.rank}: {text}"
    _log.error("%s", text, exc_info=traceback)


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def result(what: RenderableType) -> None:
    if isinstance(what, str):
        result_text(what + "\n")
    elif distributed.is_main:
        with _standard_output():
            _out.print(what, soft_wrap=False)


def result_json(value: object) -> None:
    result_text(json.dumps(value, indent=2, default=str) + "\n")


def result_text(text: str) -> None:
    """Exactly `text`, for programs; on a terminal names cannot command it."""
    if distributed.is_main:
        seen = sys.stdout is not None and sys.stdout.isatty()
        with _standard_output():
            print(_printable_lines(text) if seen else text, end="", flush=True)


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader has enough: Typer ends without a word
        raise
    except OSError as error:
        raise CnnftError(f"standard output cannot be written: {error.strerror}") from error


@contextmanager
def progress(*columns: str, beside_results: bool = False) -> Iterator[Progress]:
    """A bar on standard error; invisible where that is no terminal, or with --quiet.

    `beside_results`: results are printed meanwhile; on the same terminal they are progress enough.
    """
    quiet = _shown.level > logging.INFO
    shown = screen.is_terminal and not quiet and not (beside_results and _out.is_terminal)
    shown = shown and distributed.is_main and "CI" not in os.environ
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not shown,
    )
    with bar if shown else nullcontext():  # before rich 14.3 even one that is off ends its line
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
