"""Which folders hold a split, and which a class:

    flat         DATA/CLASS/**            no split is separated
    split        DATA/train/CLASS/**      and val, test, under their usual names
    class-split  DATA/CLASS/train/**

A folder counts where it holds images.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from cnnft.data.dataset import SplitName
from cnnft.data.folders import Tree
from cnnft.data.names import name_of
from cnnft.errors import CnnftError, listed

SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold a split, in lower case: Train and VAL are meant as well."""

KnownLayout = Literal["flat", "split", "class-split"]

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")

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
    named, splits = splits_in(tree, tree.root), split_folders(tree)
    if ordinary and not ("train" in splits and len(named) > 1):
        _refuse_other_names(tree, children)
        if splits or (named and "train" not in named):
            _refuse_beside(tree, list(splits.values()) or [p for ps in named.values() for p in ps])
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
    return listed(sorted(map(name_of, paths)), _SHOWN)


def hold(paths: Sequence[str]) -> str:
    return f"{some(paths)} {'holds' if len(paths) == 1 else 'hold'}"


def _refuse_other_names(tree: Tree, children: list[str]) -> None:
    """Raises `CnnftError` where folders hold the same classes and have names such as seg_train and
    seg_test.
    """
    found: dict[SplitName, str] = {}
    for path in children:
        words = {word.lower().removesuffix("set") for word in _WORD.findall(name_of(path))}
        for split, names in SPLIT_FOLDERS.items():
            if words.intersection(names):
                found.setdefault(split, dataset_within(tree, path) or path)
    inside = Counter(name_of(p) for path in found.values() for p in tree.with_images(path))
    if shared := [name for name, count in inside.items() if count > 1]:
        moves = {path: str(Path(tree.root, split)) for split, path in found.items()}
        ways = [f"{path} to {target}" for path, target in moves.items() if path != target]
        raise CnnftError(
            f"{tree.root} can be read in two ways: give --layout flat if {some(children)} are the "
            f"classes, or move {', '.join(ways)} if the classes are {some(shared)}"
        )


def _refuse_beside(tree: Tree, splits: list[str]) -> None:
    """Raises `CnnftError`: folders of a split's name may as well be classes."""
    children = tree.with_images(tree.root)
    others = some(path for path in children if path not in splits)
    inside = {name_of(path) for split in splits for path in tree.with_images(split)}
    held = f" ({some(inside)})" if inside else ""
    if split_of(splits[0]) == "train":
        way = (
            f"--layout split if {hold(splits)} the training images{held} and {others} should be "
            "left out"
        )
    else:
        way = (
            f"move {others} into {Path(tree.root, 'train')} if {hold(splits)} images to evaluate "
            f"on{held}"
        )
    raise CnnftError(
        f"{tree.root} can be read in two ways: give --layout flat if {some(children)} are the "
        f"classes, or {way}"
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
            f"{tree.root} can be read in two ways: {hold(separated)} train and other splits, "
            f"{some(rest)} none: give --layout class-split to use the splits, or --layout flat to "
            f"take all images of {some(classes)} together"
        )
