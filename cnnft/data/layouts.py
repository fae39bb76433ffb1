"""Which folders hold a split, and which a class:

    flat         DATA/CLASS/**            no split is separated
    split        DATA/train/CLASS/**      and val, test, under their usual names
    class-split  DATA/CLASS/train/**

A folder counts where it holds images.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from cnnft.data.dataset import SplitName
from cnnft.data.folders import Tree, name_of
from cnnft.errors import CnnftError

SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold a split, in lower case: Train and VAL are meant as well."""

KnownLayout = Literal["flat", "split", "class-split"]

_SHOWN = 6  # names in a sentence


def find_layout(tree: Tree, classes: Collection[str] = ()) -> KnownLayout:
    """What the names of the folders say; where `classes` are known, whose names they are.

    Raises:
        CnnftError: nothing, as there are no class folders, or two things.
    """
    children = tree.with_images(tree.root)
    if known := _layout_of(tree, children, frozenset(map(comparable, classes))):
        return known
    ordinary = [path for path in children if split_of(path) is None]
    if ordinary and _all_separated(tree, children):
        return "class-split"
    splits = split_folders(tree)
    if splits and ordinary:
        _require_split(tree, splits, children)
    if splits:
        return "split"
    if children and not ordinary:
        raise CnnftError(
            f"{tree.root} holds {some(children)}, and there are no class folders in "
            f"{'it' if len(children) == 1 else 'them'}: put the images into one folder per class, "
            f"such as {Path(children[0], 'cats')}, or give --layout flat if these are the "
            "classes"
        )
    _refuse_half_separated(tree, children)
    return "flat"


def _layout_of(tree: Tree, children: list[str], classes: frozenset[str]) -> KnownLayout | None:
    """The layout in which all folders are of these classes; None: there is none, or two are."""
    splits = [path for paths in splits_in(tree, tree.root).values() for path in paths]
    inside = [path for split in splits for path in tree.with_images(split)]
    are_classes = [
        bool(paths) and {comparable(name_of(path)) for path in paths} <= classes
        for paths in (children, inside)
    ]
    if are_classes == [True, False]:
        return "class-split" if _all_separated(tree, children) else "flat"
    return "split" if are_classes == [False, True] else None


def comparable(name: str) -> str:
    """Linux and macOS may write the same name in other bytes."""
    return normalize("NFC", name)


def split_of(path: str) -> SplitName | None:
    """Which split a folder of this name is usually for."""
    for split, names in SPLIT_FOLDERS.items():
        if name_of(path).lower() in names:
            return split
    return None


def split_folders(tree: Tree) -> dict[SplitName, str]:
    """Folders of a split's name that hold class folders.

    Raises:
        CnnftError: there are two of one split, such as val and valid.
    """
    found = splits_in(tree, tree.root)
    holding = {split: [p for p in paths if tree.with_images(p)] for split, paths in found.items()}
    return {split: only(paths, split) for split, paths in holding.items() if paths}


def splits_in(tree: Tree, folder: str) -> dict[SplitName, list[str]]:
    """Folders of a split's name in `folder` that hold images."""
    found: dict[SplitName, list[str]] = {split: [] for split in SPLIT_FOLDERS}
    for path in tree.listing(folder).folders:
        split = split_of(path)
        if split and tree.holds_images(path):
            found[split].append(path)
    return {split: paths for split, paths in found.items() if paths}


def only(folders: Sequence[str], split: SplitName) -> str:
    """Raises `CnnftError`: there are more."""
    if len(folders) > 1:
        raise CnnftError(f"{folders[0]} and {folders[1]} are both a {split} folder: remove one")
    return folders[0]


def dataset_within(tree: Tree, folder: str) -> str | None:
    """The folder below this one, or itself, that seems to be the dataset."""
    while children := tree.with_images(folder):
        if len(children) > 1 or split_of(children[0]):
            return folder
        folder = children[0]
    return None


def some(paths: Iterable[str]) -> str:
    names = sorted(name_of(path) for path in paths)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _require_split(tree: Tree, splits: dict[SplitName, str], children: list[str]) -> None:
    """Raises `CnnftError` where a folder of a split's name may as well be a class."""
    named = {split_of(path) for path in children} - {None}
    if "train" in splits and len(named) > 1:
        return
    split, path = next(iter(splits.items()))
    inside, others = tree.with_images(path), [child for child in children if child != path]
    if split == "train":
        way = f"--layout split if {some([path])} holds the training images ({some(inside)})"
    else:
        way = (
            f"move {some(others)} into {Path(tree.root, 'train')} if {some([path])} holds "
            f"images to {'validate' if split == 'val' else 'test'} on ({some(inside)})"
        )
    raise CnnftError(
        f"{tree.root} can be read in two ways: give --layout flat if {some(children)} are the "
        f"classes, or {way}"
        + (f" and {some(others)} should be left out" if split == "train" else "")
    )


def _all_separated(tree: Tree, classes: list[str]) -> bool:
    """Whether all have a train folder, or, where some class has none, all have splits only."""
    inside = {path: tree.with_images(path) for path in classes}
    has_train = [any(split_of(p) == "train" for p in paths) for paths in inside.values()]
    splits_only = all(paths and all(map(split_of, paths)) for paths in inside.values())
    return all(has_train) or (any(has_train) and splits_only)


def _refuse_half_separated(tree: Tree, classes: list[str]) -> None:
    """Raises `CnnftError` where some classes have train and other splits, and some have not."""
    separated = [path for path in classes if {"train"} < splits_in(tree, path).keys()]
    if separated:
        rest = [path for path in classes if path not in separated]
        raise CnnftError(
            f"{tree.root} can be read in two ways: {some(separated)} hold train and other splits, "
            f"{some(rest)} none: give --layout class-split to use the splits, or --layout flat to "
            f"take all images of {some(classes)} together"
        )
