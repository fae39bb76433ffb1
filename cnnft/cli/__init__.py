"""The command line: one file per command, each importing what it needs when it runs."""

import sys

from cnnft.cli import app, console
from cnnft.errors import CnnftError
from cnnft.machine import distributed

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments` (default: the process's) and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be any bytes
    with console.speaking(sys.argv[1:] if arguments is None else arguments):
        code = _run(arguments)
        distributed.finished = code == 0
        sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    """The exit code; the one place where errors become text."""
    try:
        # Typer vendors Click and exports few of its exceptions, so they are known by their shape.
        code: int = app.app(arguments, prog_name="cnnft", standalone_mode=False) or 0
        if code == INTERRUPTED:  # Typer turns the exception into this
            console.error("interrupted")
        return code
    except CnnftError as error:
        if app.debug:
            raise
        console.error(str(error), met_by_main=error.met_by_main)
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # ClickException
            if message := error.format_message().replace("\n", " "):  # none after showing help
                console.error(message, met_by_main=True)
            return int(error.exit_code)
        if app.debug:
            raise
        console.error(_explain(error), traceback=True)
        return 1


def _explain(error: Exception) -> str:
    """A sentence for what the machine refused; the rest is our mistake."""
    reason = str(error).split("\n")[0].rstrip(".")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: lower --batch-size, or take a smaller --backbone"
    if "gloo" in reason or "NCCL" in reason:
        return f"another of the processes ended ({reason})"
    if "DataLoader worker" in reason:
        return (
            f"a process that loads images died ({reason}), most often for lack of memory: lower "
            "--workers, or 0 for none"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return (
        f"unexpected {type(error).__name__}: {reason} "
        "(this is a bug: cnnft --debug COMMAND … shows where)"
    )
