"""Sources of labelled images: what a folder holds, by split and class, before a file is opened.

This is the one place that knows a layout of folders:

    flat         DATA/CLASS/**            no split is separated
    split        DATA/train/CLASS/**      and val, test, under their usual names
    class-split  DATA/CLASS/train/**
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cnnft.config.choices import Layout
from cnnft.data.dataset import Samples, Skipped, SplitName
from cnnft.data.images import suffix_problem
from cnnft.errors import CnnftError, UsageError, why_not_utf8

SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold a split, in lower case: Train and VAL are meant as well."""

OnFiles = Callable[[int, int | None], object]
"""Called with how many more files were found (None), or were checked (of how many in all)."""

IGNORED = {"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""What systems leave in folders, in lower case; hidden files are ignored as well."""

_KnownLayout = Literal["flat", "split", "class-split"]

_SHOWN = 6  # names in a sentence


class Source(Protocol):
    """Labelled files by split; a new kind of source implements this, and `open_source` opens it."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    @property
    def separated(self) -> bool:
        """Whether it has splits; if not, all of it is train."""
        ...

    @property
    def splits(self) -> tuple[SplitName, ...]: ...

    def classes(self, split: SplitName) -> tuple[str, ...]:
        """Sorted."""
        ...

    def place(self, split: SplitName, name: str) -> str:
        """Where the images of a class belong, for sentences."""
        ...

    def files(
        self, split: SplitName, classes: tuple[str, ...], on_files: OnFiles
    ) -> tuple[Samples, list[Skipped]]:
        """Its files with labels by `classes`, and those that are no images by their name."""
        ...


def open_source(source: str | Path, layout: Layout = "auto") -> Source:
    """What the user named as DATA.

    Raises:
        UsageError: it is not there, or no source.
        CnnftError: its folders are not of that layout, or may be of none.
    """
    folder = require_source(source)
    kind = _find_layout(folder) if layout == "auto" else layout
    if kind == "flat":
        return FolderSource(folder, kind, {"train": _by_name(class_folders(folder), folder)})
    if kind == "split":
        splits = _split_folders(folder)
        found = {split: _by_name(class_folders(path), path) for split, path in splits.items()}
    else:
        found = _class_splits(folder)
    if not found:
        example = "train/cats" if kind == "split" else "cats/train"
        raise CnnftError(f"{folder} has no folders of --layout {kind}, such as {folder / example}")
    return FolderSource(folder, kind, found)


def require_source(data: str | Path) -> Path:
    """Raises `UsageError` where DATA cannot be opened; reads nothing of it."""
    folder = Path(data)
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the folder that holds the class folders")
    return folder


@dataclass(frozen=True)
class FolderSource:
    """Class folders, in one of the layouts."""

    folder: Path
    layout: _KnownLayout
    class_folders: Mapping[SplitName, Mapping[str, Path]]
    """Split -> class -> its folder."""

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def separated(self) -> bool:
        return self.layout != "flat"

    @property
    def splits(self) -> tuple[SplitName, ...]:
        return tuple(self.class_folders)

    def classes(self, split: SplitName) -> tuple[str, ...]:
        """Sorted as torchvision's ImageFolder sorts them.

        Raises:
            CnnftError: there are none, or a name is not UTF-8.
        """
        folders = self.class_folders[split]
        if not folders:
            raise CnnftError(
                f"{self.folder} holds no class folders: put the images into one folder per class, "
                f"such as {self.folder / 'cats'} and {self.folder / 'dogs'}"
            )
        for name, folder in folders.items():
            if reason := why_not_utf8(name):
                raise CnnftError(f"class folder {folder} {reason}")
        return tuple(sorted(folders))

    def place(self, split: SplitName, name: str) -> str:
        folders = self.class_folders[split]
        if name in folders:
            return str(folders[name])
        if self.layout == "class-split":
            return str(self.folder / name / split)
        sibling = next(iter(folders.values()), None)
        return str((sibling.parent if sibling else self.folder) / name)

    def files(
        self, split: SplitName, classes: tuple[str, ...], on_files: OnFiles
    ) -> tuple[Samples, list[Skipped]]:
        folders = self.class_folders[split]
        if unknown := sorted(set(self.classes(split)) - set(classes)):
            raise CnnftError(
                f"{folders[unknown[0]]} is no class of the training data ({_some(classes)}): "
                "rename or remove the folder"
            )
        paths: list[str] = []
        labels: list[int] = []
        skipped: list[Skipped] = []
        for label, name in enumerate(classes):
            if name in folders:
                images, others = image_files(folders[name], on_files)
                paths += images
                labels += [label] * len(images)
                skipped += others
        return Samples(tuple(paths), tuple(labels), classes), skipped


# ---------------------------------------------------------------- layouts


def _find_layout(folder: Path) -> _KnownLayout:
    """split where a folder of a split's name holds class folders; else a class may have that name.

    Raises:
        CnnftError: all folders are named like splits, and hold no class folders.
    """
    if _split_folders(folder):
        return "split"
    classes = class_folders(folder)
    if classes and all(split_of(name) for name in classes):
        raise CnnftError(
            f"{folder} holds {_some(classes)}, and there are no class folders in "
            f"{'it' if len(classes) == 1 else 'them'}: put the images into one folder per class, "
            f"such as {folder / classes[0] / 'cats'}, or give --layout flat if these are the "
            "classes"
        )
    if classes and all("train" in _splits_in(folder / name) for name in classes):
        return "class-split"
    return "flat"


def split_of(name: str) -> SplitName | None:
    """Which split a folder of this name is usually for."""
    for split, names in SPLIT_FOLDERS.items():
        if name.lower() in names:
            return split
    return None


def _split_folders(folder: Path) -> dict[SplitName, Path]:
    """Folders of a split's name that hold class folders.

    Raises:
        CnnftError: there are two of one split, such as val and valid.
    """
    found: dict[SplitName, Path] = {}
    named = _splits_in(folder)
    for split in SPLIT_FOLDERS:
        if holding := [path for path in named.get(split, ()) if class_folders(path)]:
            found[split] = _only(holding, split)
    return found


def _only(folders: Sequence[Path], split: SplitName) -> Path:
    if len(folders) > 1:
        raise CnnftError(f"{folders[0]} and {folders[1]} are both a {split} folder: remove one")
    return folders[0]


def _splits_in(folder: Path) -> dict[SplitName, list[Path]]:
    """Folders of a split's name, whatever they hold."""
    found: dict[SplitName, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        split = split_of(entry.name)
        if split and entry.is_dir():
            found.setdefault(split, []).append(entry)
    return found


def _class_splits(folder: Path) -> dict[SplitName, dict[str, Path]]:
    found: dict[SplitName, dict[str, Path]] = {split: {} for split in SPLIT_FOLDERS}
    for name in class_folders(folder):
        for split, folders in _splits_in(folder / name).items():
            found[split][name] = _only(folders, split)
    return {split: classes for split, classes in found.items() if classes}


def _by_name(names: Sequence[str], folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in names}


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted as torchvision's ImageFolder sorts them."""
    return tuple(
        sorted(
            entry.name
            for entry in os.scandir(folder)
            # Not entry.is_dir(), which raises at a link that leads to itself.
            if not _ignored(entry.name) and Path(entry).is_dir() and not _holds_runs(entry.path)
        )
    )


def _holds_runs(folder: str) -> bool:
    """Whether it is our own runs/, which appears inside the data of `cnnft finetune .`."""
    with os.scandir(folder) as entries:  # one by one: there may be millions
        return any(
            entry.is_dir(follow_symlinks=False) and Path(entry, "config.toml").is_file()
            for entry in entries
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


# ---------------------------------------------------------------- files


def image_files(
    folder: str | Path, on_files: OnFiles = lambda count, total: None
) -> tuple[list[str], list[Skipped]]:
    """Image files below `folder` in the order of torchvision's ImageFolder, and all others.

    Hidden files and what systems leave behind are in neither list. Symbolic links are followed,
    each real folder once and none that `folder` lies in, so that a loop ends.

    Raises:
        CnnftError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise CnnftError(f"{error.filename}: cannot be read ({error.strerror})") from error

    images: dict[str, list[str]] = {}
    others: list[Skipped] = []
    seen = {str(parent) for parent in Path(folder).resolve().parents}
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _ignored(name))
        here = images[root] = []
        for name in sorted(name for name in names if not _ignored(name)):
            path, reason = os.path.join(root, name), suffix_problem(name)  # noqa: PTH118
            if reason is None:
                here.append(path)
            else:
                others.append(Skipped(path, reason))
        on_files(len(here), None)
    return [path for root in sorted(images) for path in images[root]], others


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED
