"""The command line: one file per command, each importing what it needs when it runs."""

import sys

from cnnft.cli import app, console
from cnnft.errors import CnnftError


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments` (default: the process's) and exit; the one place where errors become text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        # Typer vendors Click and exports few of its exceptions, so they are known by their shape.
        sys.exit(app.app(arguments, prog_name="cnnft", standalone_mode=False) or 0)
    except CnnftError as error:
        if app.debug:
            raise
        console.error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.error("interrupted")
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # ClickException
            console.error(error.format_message().replace("\n", " "))
            sys.exit(error.exit_code)
        if type(error).__name__ == "Abort":
            console.error("interrupted")
            sys.exit(130)
        if app.debug:
            raise
        reason = str(error).split("\n")[0]
        console.error(
            f"unexpected {type(error).__name__}: {reason} "
            "(this is a bug: cnnft --debug COMMAND … shows where)"
        )
        sys.exit(1)
