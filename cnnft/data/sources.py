"""Sources of labelled images: what a folder holds, by split and class, before a file is opened."""

from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

from cnnft.config.choices import Layout
from cnnft.data.dataset import (
    BESIDE_CLASSES,
    BESIDE_SPLITS,
    EMPTY,
    FOREIGN,
    HIDDEN,
    NO_SPLIT,
    PACKED,
    UNKNOWN,
    UNLABELLED,
    Samples,
    Skipped,
    SplitName,
)
from cnnft.data.folders import OnFiles, Tree
from cnnft.data.layouts import (
    SPLIT_FOLDERS,
    KnownLayout,
    comparable,
    dataset_within,
    find_layout,
    hold,
    only,
    some,
    split_folders,
    split_of,
    splits_in,
)
from cnnft.data.names import name_of, why_no_images
from cnnft.errors import CnnftError, UsageError, why_not_utf8


class Source(Protocol):
    """Labelled files by split; a new kind of source implements this, and `open_source` opens it.

    All that it holds is among the files of a split, left out of one, or `left_out` of them all.
    """

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

    @property
    def hint(self) -> str:
        """What may be wrong where classes are missing; "" or a clause."""
        ...

    @property
    def nested(self) -> str:
        """The same, where the source seems to be above the one that is meant."""
        ...

    def classes(self, split: SplitName) -> tuple[str, ...]:
        """Those that have files, sorted."""
        ...

    def files(self, split: SplitName, classes: tuple[str, ...]) -> tuple[Samples, list[Skipped]]:
        """Its files with labels by `classes`, and what is left out of it: files that are no images
        by their name, and whole classes that are `UNKNOWN`."""
        ...

    def notes(self, split: SplitName, classes: tuple[str, ...]) -> list[str]:
        """What was understood otherwise than a reader might expect; sentences."""
        ...

    def left_out(self) -> list[Skipped]:
        """What belongs to no split."""
        ...


def open_source(
    source: str | Path,
    layout: Layout = "auto",
    *,
    include_hidden: bool = False,
    classes: Collection[str] = (),
    on_files: OnFiles = lambda count, total: None,
) -> Source:
    """What the user named as DATA; `classes`, of a model, may say what its folders are.

    Raises:
        UsageError: it is not there, or no source.
        CnnftError: its folders are not of that layout, may be of two, or cannot be read.
    """
    tree = Tree(require_source(source), include_hidden, on_files)
    _require_folders(tree)
    folders = FolderSource(tree, find_layout(tree, classes) if layout == "auto" else layout)
    if not folders.splits:
        example = Path(tree.root, "train/cats" if layout == "split" else "cats/train")
        raise CnnftError(f"{tree.root} has no folders of --layout {layout}, such as {example}")
    return folders


def _require_folders(tree: Tree) -> None:
    """Raises `CnnftError` where a class or a split may be missing, as a link leads nowhere."""
    broken = tree.broken(tree.root)
    for folder in tree.listing(tree.root).folders:
        broken += [path for path in tree.broken(folder) if split_of(folder) or split_of(path)]
    if broken:
        raise CnnftError(f"{broken[0]} is a link that leads nowhere: repair or remove it")


def require_source(data: str | Path) -> Path:
    """Raises `UsageError` where DATA cannot be opened; reads nothing of it."""
    if not str(data):  # Path would make it the current folder
        raise UsageError("DATA is empty: give an image folder")
    folder = Path(data)
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the folder that holds the class folders")
    return folder


class FolderSource:
    """Class folders, in one of the layouts. Names are compared in Unicode's form NFC."""

    def __init__(self, tree: Tree, layout: KnownLayout) -> None:
        self.tree = tree
        self.layout = layout
        self._named: dict[SplitName, list[tuple[str, str]]] = {}
        self._split_folders = split_folders(tree) if layout == "split" else {}

    @property
    def name(self) -> str:
        return self.tree.root

    @property
    def separated(self) -> bool:
        return self.layout != "flat"

    @cached_property
    def splits(self) -> tuple[SplitName, ...]:
        if self.layout == "flat":
            return ("train",)
        found = set(self._split_folders)
        if self.layout == "class-split":
            for path in self.tree.with_images(self.name):
                found |= splits_in(self.tree, path).keys()
        return tuple(split for split in SPLIT_FOLDERS if split in found)

    @property
    def hint(self) -> str:
        parent = self._split_folders.get("train", self.name)
        if self.nested:
            return self.nested
        reasons = {path: self.tree.without_images(path).reason for path in self._empty(parent)}
        beside = self.tree.beside(parent, BESIDE_CLASSES)
        loose = sum(file.images for file in beside if file.reason == BESIDE_CLASSES)
        hidden = sum(file.images for file in beside if file.reason == HIDDEN)
        if not loose and not self.tree.with_images(parent) and why_no_images(beside) != EMPTY:
            reasons[parent] = why_no_images(beside)
        clauses = []
        for reason in (FOREIGN, PACKED, EMPTY):
            if paths := [path for path, why in reasons.items() if why == reason]:
                clauses.append(f"; {hold(paths)} {reason}")
        clauses += [f"; {loose} image(s) lie beside each other"] if loose else []
        clauses += [f"; {hidden} hidden image(s) need --include-hidden"] if hidden else []
        return "".join(clauses)

    @property
    def nested(self) -> str:
        folders = self.tree.with_images(self._split_folders.get("train", self.name))
        within = dataset_within(self.tree, folders[0]) if folders else None
        if within is None:
            return ""
        return f"; did you mean {within}, which holds {some(self.tree.with_images(within))}?"

    def classes(self, split: SplitName) -> tuple[str, ...]:
        """Sorted as torchvision's ImageFolder sorts them.

        Raises:
            CnnftError: there are none, or a name is not UTF-8.
        """
        folders = self._class_folders(split)
        if not folders:
            raise CnnftError(
                f"{self.name} holds no class folders{self.hint}: put the images into one folder "
                f"per class, such as {Path(self.name, 'cats')} and {Path(self.name, 'dogs')}"
            )
        spelling: dict[str, str] = {}
        for name, path in folders:
            if reason := why_not_utf8(name):
                raise CnnftError(f"class folder {path} {reason}")
            spelling.setdefault(comparable(name), name)
        return tuple(sorted(spelling.values()))

    def files(self, split: SplitName, classes: tuple[str, ...]) -> tuple[Samples, list[Skipped]]:
        label_of = {comparable(name): label for label, name in enumerate(classes)}
        images: list[list[str]] = [[] for _ in classes]
        skipped: list[Skipped] = []
        for name, path in self._class_folders(split):
            label = label_of.get(comparable(name))
            if label is None:
                skipped.append(self.tree.whole(path, UNKNOWN))
                continue
            found, others = self.tree.contents(path)
            images[label] += found
            skipped += others
        if self.layout == "split":
            skipped += self._rest(self._split_folders[split], BESIDE_CLASSES)
        labels = [label for label, paths in enumerate(images) for _ in paths]
        return Samples(tuple(chain.from_iterable(images)), tuple(labels), classes), skipped

    def notes(self, split: SplitName, classes: tuple[str, ...]) -> list[str]:
        spelling = {comparable(name): name for name in classes}
        return [
            f"{path} holds class {spelling[comparable(name)]}: the names differ only in how "
            "Unicode composes their characters"
            for name, path in self._class_folders(split)
            if spelling.get(comparable(name), name) != name
        ]

    def left_out(self) -> list[Skipped]:
        tree, root = self.tree, self.name
        if self.layout == "flat":
            return self._rest(root, BESIDE_CLASSES)
        skipped = self._rest(root, BESIDE_SPLITS if self.layout == "split" else BESIDE_CLASSES)
        for path in tree.with_images(root):
            if self.layout == "class-split":
                found = splits_in(tree, path)
                if not found:
                    skipped.append(tree.whole(path, NO_SPLIT))
                    continue
                skipped += self._rest(path, BESIDE_SPLITS)
                used = {path for paths in found.values() for path in paths}
                others = [path for path in tree.with_images(path) if path not in used]
                skipped += [tree.whole(other, BESIDE_SPLITS) for other in others]
            elif path not in self._split_folders.values():
                labelled = tree.with_images(path)
                skipped.append(tree.whole(path, BESIDE_SPLITS if labelled else UNLABELLED))
        return skipped

    def _class_folders(self, split: SplitName) -> list[tuple[str, str]]:
        """(class as its folder is called, the folder with its images), of those that hold any."""
        if split not in self._named:
            self._named[split] = list(self._find_folders(split))
        return self._named[split]

    def _find_folders(self, split: SplitName) -> Iterator[tuple[str, str]]:
        tree = self.tree
        if self.layout == "class-split":
            for path in tree.with_images(self.name):
                if folders := splits_in(tree, path).get(split):
                    yield name_of(path), only(folders, split)
        else:
            for path in tree.with_images(self._split_folders.get(split, self.name)):
                yield name_of(path), path

    def _rest(self, folder: str, reason: str) -> list[Skipped]:
        """Of a folder that holds folders: its files, and folders without images."""
        empty = map(self.tree.without_images, self._empty(folder))
        return self.tree.beside(folder, reason) + list(empty)

    def _empty(self, folder: str) -> list[str]:
        tree = self.tree
        return [path for path in tree.listing(folder).folders if not tree.holds_images(path)]
