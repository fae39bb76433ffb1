"""The command line: one file per command, each importing what it needs when it runs."""

import atexit
import gc
import signal
import sys

from cnnft.cli import app, causes, console
from cnnft.errors import CnnftError
from cnnft.machine import distributed, interruption, limits

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
_OBJECTS = 10_000
"""After which garbage is collected; importing torch makes a million, and with Python's 700 they are
searched again and again (docs/speed.md)."""


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments` (default: the process's) and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be any bytes
    limits.raise_open_files()
    limits.compute_in_one_thread_where_few_are_allowed()
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)  # else all that torch is made of is collected first, for a second
    with (
        console.speaking(sys.argv[1:] if arguments is None else arguments),
        interruption.handled(console.say, lambda text: console.error(f"interrupted: {text}")),
    ):
        try:
            code = _run(arguments)
        except KeyboardInterrupt:  # while an error is told
            code = _interrupted()
        distributed.finished = code == 0
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    """The exit code; the one place where errors become text."""
    try:
        # Typer vendors Click and exports few of its exceptions, so they are known by their shape.
        code: int = app.app(arguments, prog_name="cnnft", standalone_mode=False) or 0
        return _interrupted() if code == INTERRUPTED else code  # Typer turns the exception into it
    except CnnftError as error:
        if app.debug:
            raise
        console.error(str(error), met_by_main=error.met_by_main)
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # ClickException
            if message := error.format_message().replace("\n", " "):  # none after showing help
                console.error(message, met_by_main=True)
            return int(error.exit_code)
        if app.debug:
            raise
        console.error(causes.explain(error), traceback=True)
        return 1


def _interrupted() -> int:
    number = interruption.received() or signal.SIGINT
    by_itself = causes.interrupted_by_itself() if number == signal.SIGINT else None
    if by_itself or distributed.is_main:  # which says so for all
        console.error(by_itself or "interrupted")
    return 1 if by_itself else 128 + number
