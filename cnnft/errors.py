"""The user's mistake, in one sentence, and what to do about it."""

import difflib
import os
import sys
from collections.abc import Iterable, Sequence

_LONGEST_REASON = 200  # characters; some libraries print whole tensors of names


class CnnftError(Exception):
    """Something about the data, a file or the machine stops the command."""

    exit_code = 1
    met_by_main = False
    """Of several processes, whether the main one meets it too, and so reports it for all."""


class UsageError(CnnftError):
    """A wrong flag or argument: an unknown name, a missing path, an impossible combination."""

    exit_code = 2
    met_by_main = True


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what is near it, or nothing."""
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def why_not_utf8(name: str) -> str | None:
    """Why a path or name cannot be written as UTF-8, and the way out; None where it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(name).decode()
        except UnicodeError:
            return "is not UTF-8: rename it"
        encoding = sys.getfilesystemencoding()
        return f"is read as {encoding} in this locale: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    return None


def printable(text: str) -> str:
    """In one line, and harmless: names of files may hold line breaks and a terminal's commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(names: Sequence[str], most: int) -> str:
    """The first of them, and an ellipsis for the others."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What another library says, as a part of our sentence: its first line, without the stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__).rstrip(".!:")
    text = printable(text)
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " …"
