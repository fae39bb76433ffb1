"""What the name of a file or folder says of it."""

import os
from collections.abc import Iterable

from cnnft.data.dataset import EMPTY, FOREIGN, PACKED, UNSUITED, Skipped
from cnnft.data.images import SUFFIXES

SYSTEM = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "#recycle", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""What systems leave in folders, in lower case."""

_UNREAD = frozenset(
    {".jp2", ".j2k", ".jpx", ".jxl", ".psd", ".svg", ".tga", ".ico", ".exr", ".hdr", ".dcm"}
    | {".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".orf", ".raf", ".rw2", ".pef", ".srw"}
)
"""Of images in formats that are never opened."""

_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})

_LONGEST_SUFFIX = 8
"""Longer ones, and numbers, are often a part of the name: they would be as many as the files."""


def is_named_as_image(name: str) -> bool:
    """By its suffix; what macOS writes beside each file of other systems is none (._photo.jpg)."""
    base = name_of(name)
    suffix = base.rpartition(".")[2].lower()
    return f".{suffix}" in SUFFIXES and "." in base[1:] and not base.startswith("._")


def name_of(path: str) -> str:
    """The last part of a path that has no slash at its end."""
    return path.rpartition(os.sep)[2]


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def unsuited(name: str) -> str | None:
    """Why a file of this name is not even opened, of few kinds; None: it is, as one without suffix
    is.
    """
    _, dot, suffix = name.lower().rpartition(".")
    if not dot or not suffix or f".{suffix}" in SUFFIXES:
        return None
    if len(suffix) > _LONGEST_SUFFIX or not suffix.isascii() or not suffix.isprintable():
        return UNSUITED
    return UNSUITED if suffix.isdigit() else f"{UNSUITED} (.{suffix})"


def why_no_images(others: Iterable[Skipped]) -> str:
    """The reason for a folder without images, which holds these files."""
    suffixes = {file.suffix for file in others}
    if suffixes & _UNREAD:
        return FOREIGN
    return PACKED if suffixes & _ARCHIVES else EMPTY
