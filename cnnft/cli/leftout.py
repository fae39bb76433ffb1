"""What of the data is left out, in words and as JSON."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cnnft.cli import console

if TYPE_CHECKING:
    from cnnft.data.dataset import Skipped

_MOST_NAMES = 3
_MOST_SUFFIXES = 5


def show_left_out(skipped: Sequence["Skipped"], root: str, elsewhere: str) -> None:
    """Images that cannot be read line by line, and in one line all that was left out.

    Folders are named from `root`, the data; `elsewhere` says where the rest is listed.
    """
    from cnnft.data.dataset import FOREIGN, PACKED

    warn_of_skipped([entry for entry in skipped if entry.is_unreadable], elsewhere)
    line = summary(skipped, root)
    if line:
        missed = any(
            entry.images or entry.reason in (FOREIGN, PACKED)
            for entry in skipped
            if not entry.is_expected
        )
        say: Callable[[str], None] = console.warn if missed else console.say
        say(f"left out: {line}")


def warn_of_skipped(files: Sequence["Skipped"], elsewhere: str) -> None:
    """A line for each of the first files and a count; `elsewhere` is about the rest."""
    most = 10
    for file in files[:most]:
        console.warn(f"skipped {file.path}: {file.reason}")
    if files:
        count = sum(file.files for file in files)
        console.warn(f"{count} file(s) skipped" + (f": {elsewhere}" if len(files) > most else ""))


def summary(skipped: Sequence["Skipped"], root: str) -> str:
    """In one line; "" where nothing was left out but what nobody misses."""
    from cnnft.data.dataset import HIDDEN, OWN

    unreadable = sum(entry.images for entry in skipped if entry.is_unreadable)
    parts = [_count(unreadable, "image") + " that cannot be read"] if unreadable else []
    hidden: list[Skipped] = []
    places: Counter[str] = Counter()
    folders: dict[str, list[Skipped]] = {}
    suffixes: Counter[str] = Counter()
    for entry in skipped:
        if entry.is_expected and entry.reason != OWN:
            continue
        if entry.is_folder:
            folders.setdefault(entry.reason, []).append(entry)
        elif entry.suffix is not None:
            suffixes[entry.suffix] += entry.files
        elif entry.is_unreadable:
            suffixes[""] += entry.files - entry.images
        elif entry.reason == HIDDEN:
            hidden.append(entry)
        else:
            places[entry.reason] += entry.images
    if hidden:
        number = sum(entry.images for entry in hidden)
        parts.append(f"{_count(number, 'hidden image')} in {_names(hidden, root)}")
    parts += [f"{_count(number, 'image')} {reason}" for reason, number in places.items()]
    if suffixes := +suffixes:
        common = sorted(suffixes.items(), key=lambda item: (-item[1], not item[0], item[0]))
        kinds = [f"{n} {kind or 'other'}" for kind, n in common[:_MOST_SUFFIXES]]
        kinds += ["…"] if len(common) > _MOST_SUFFIXES else []
        number = suffixes.total()
        words = "file that is no image" if number == 1 else "files that are no images"
        parts.append(f"{number} {words} ({', '.join(kinds)})")
    parts += [_folders(entries, reason, root) for reason, entries in folders.items()]
    return ", ".join(parts)


def left_out_lines(skipped: Sequence["Skipped"]) -> list[str]:
    """Each of them, with its numbers."""
    return [f"{entry.path}: {entry.reason}{_numbers(entry)}" for entry in skipped]


def skipped_json(skipped: Sequence["Skipped"]) -> list[dict[str, Any]]:
    return [
        {"file": e.path, "reason": e.reason, "files": e.files, "images": e.images} for e in skipped
    ]


def _folders(entries: Sequence["Skipped"], reason: str, root: str) -> str:
    images = sum(entry.images for entry in entries)
    return f"{'folder' if len(entries) == 1 else 'folders'} {_names(entries, root)} ({reason}" + (
        f"; {_count(images, 'image')})" if images else ")"
    )


def _names(entries: Sequence["Skipped"], root: str) -> str:
    more = len(entries) - _MOST_NAMES
    names = ", ".join(_from(root, entry) for entry in entries[:_MOST_NAMES])
    return names + (f" and {more} more" if more > 0 else "")


def _from(root: str, entry: "Skipped") -> str:
    inside = entry.path.removeprefix(root.rstrip(os.sep) + os.sep)
    return console.printable(inside or entry.path)


def _numbers(entry: "Skipped") -> str:
    if not entry.is_folder and entry.files == 1:
        return ""
    return f" ({_count(entry.files, 'file')}, {_count(entry.images, 'image')})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
