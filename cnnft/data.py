"""A folder of images -> `Samples`: files, classes, hashes, the train/val split."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from cnnft import distributed
from cnnft.errors import CnnftError, UsageError
from cnnft.images import (
    ImageError,
    find_problem,
    ignoring_oddities,
    read_bytes,
    suffix_problem,
)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold a split, in lower case: Train and VAL are meant as well."""

OnFiles = Callable[[int, int | None], object]
"""Told how many more files were found (None), or were checked (of how many in all)."""

IGNORED = {"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini"}
"""What systems leave in folders, in lower case; hidden files are ignored as well."""

_UNDER_WAY = 256  # files: enough for every thread to have work while the first is waited for

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Samples:
    """Labelled image files; of millions, strings take less memory than `Path` objects."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    hashes: tuple[str, ...] = ()
    """SHA-256 of the content, filled in by `check`."""
    skipped: tuple[Skipped, ...] = ()
    """What the folder holds besides: `scan` judges by the name, `check` by the content."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> "Samples":
        """Some of the samples, without the skipped files, which belong to the whole."""
        chosen = list(indices)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            hashes=tuple(self.hashes[i] for i in chosen) if self.hashes else (),
            skipped=(),
        )

    @cached_property
    def names(self) -> tuple[object, ...]:
        """What names each image wherever it stands: its hash, with a number where another image
        before it has the same; its position where nobody has read the contents.
        """
        if not self.hashes:
            return tuple(range(len(self)))
        seen: Counter[str] = Counter()
        names: list[object] = []
        for digest in self.hashes:
            names.append((digest, seen[digest]) if seen[digest] else digest)
            seen[digest] += 1
        return tuple(names)

    def counts(self) -> tuple[int, ...]:
        """Images per class, in the order of `classes`."""
        return tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())


def join(parts: Sequence[Samples]) -> Samples:
    """One after the other; all must have the same classes."""
    return replace(
        parts[0],
        paths=tuple(path for part in parts for path in part.paths),
        labels=tuple(label for part in parts for label in part.labels),
        hashes=tuple(digest for part in parts for digest in part.hashes),
        skipped=tuple(file for part in parts for file in part.skipped),
    )


# ---------------------------------------------------------------- finding the files


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


def find_split(data: Path, split: str) -> Path | None:
    """The folder of `data` that holds the split train, val or test, if there is one.

    Raises:
        CnnftError: there are two, such as val and valid.
    """
    names = SPLIT_FOLDERS[split]
    found = [entry for entry in sorted(data.iterdir()) if entry.name.lower() in names]
    found = [entry for entry in found if entry.is_dir()]
    if len(found) > 1:
        raise CnnftError(f"{found[0]} and {found[1]} are both a {split} folder: remove one")
    return found[0] if found else None


def require_folder(data: str | Path) -> Path:
    folder = Path(data)
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the folder that holds the class folders")
    return folder


def scan(
    folder: Path,
    classes: tuple[str, ...] | None = None,
    on_files: OnFiles = lambda count, total: None,
) -> Samples:
    """Read `folder`/<class>/*; with `classes`, labels follow those names, not the folder's order.

    Raises:
        CnnftError: no class folders, or (with `classes`) folders of another name.
    """
    found = class_folders(folder)
    if not found:
        raise CnnftError(
            f"{folder} holds no class folders: put the images into one folder per class, "
            f"such as {folder / 'cats'} and {folder / 'dogs'}"
        )
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise CnnftError(f"class folder {folder / name} is not UTF-8: rename it") from error
    if classes is None:
        classes = found
    elif unknown := sorted(set(found) - set(classes)):
        raise CnnftError(
            f"{folder / unknown[0]} is no class of the training data ({_some(classes)}): "
            "rename or remove the folder"
        )
    paths: list[str] = []
    labels: list[int] = []
    skipped: list[Skipped] = []
    for label, name in sorted((classes.index(name), name) for name in found):
        images, others = image_files(folder / name, on_files)
        paths += images
        labels += [label] * len(images)
        skipped += others
    return Samples(tuple(paths), tuple(labels), classes, skipped=tuple(skipped))


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def scan_training_data(
    data: Path, on_files: OnFiles = lambda count, total: None
) -> tuple[Samples, Samples | None]:
    """(train, val) of `data`; val is None where the folder does not separate one.

    Raises:
        CnnftError: fewer than two classes, an empty class, or val classes that differ from train.
    """
    folder = find_split(data, "train") or data
    val_folder = find_split(data, "val")
    if folder == data and (other := val_folder or find_split(data, "test")):
        raise CnnftError(
            f"{data} has {other.name} but no train folder: put the training images into "
            f"{data / 'train'}, or rename {other.name} if it is a class"
        )
    train = scan(folder, on_files=on_files)
    if len(train.classes) < 2:
        raise CnnftError(
            f"{folder} has one class only ({train.classes[0]}): a classifier needs at least two "
            "class folders"
        )
    _require_images(train, folder)
    if folder == data or val_folder is None:
        return train, None
    val = scan(val_folder, train.classes, on_files)
    _require_images(val, val_folder)
    return train, val


def _require_images(samples: Samples, folder: Path) -> None:
    for name, count in zip(samples.classes, samples.counts(), strict=True):
        if count == 0:
            where = folder / name
            what = "holds no images" if where.is_dir() else "is missing"
            raise CnnftError(
                f"{where} {what}: every class needs some in "
                f"{folder.name}; add images or remove the class everywhere"
            )


# ---------------------------------------------------------------- reading them once


def check(samples: Samples, *, on_file: Callable[[], object] = lambda: None) -> Samples:
    """Read every file once: the samples that can be decoded, with hashes; the rest is skipped.

    `on_file` is called after each file. Of several processes each reads its share.
    """
    found: list[str | Skipped] = []
    share = distributed.share(len(samples))
    for inspected in in_threads(_inspect, samples.paths[share.start : share.stop]):
        found.append(inspected)
        on_file()
    found = distributed.gather(found)
    skipped = [*samples.skipped, *(file for file in found if isinstance(file, Skipped))]
    readable = replace(
        samples.take(i for i, file in enumerate(found) if isinstance(file, str)),
        hashes=tuple(digest for digest in found if isinstance(digest, str)),
        skipped=tuple(sorted(skipped, key=lambda file: file.path)),
    )
    return replace(by_content(readable), skipped=readable.skipped)


def by_content(samples: Samples) -> Samples:
    """Ordered by (class, SHA-256, occurrence): the same images in the same order, whatever held
    them, so that everything that is drawn from positions is drawn alike.
    """
    keys = list(zip(samples.labels, samples.hashes, strict=True))
    return samples.take(sorted(range(len(samples)), key=keys.__getitem__))


def in_threads(
    function: Callable[[S], T], files: Iterable[S], under_way: int = _UNDER_WAY
) -> Iterator[T]:
    """function(file) of each, in order. Threads suffice: Pillow decodes outside Python's lock.

    `ThreadPoolExecutor.map` would queue all files at once, which takes more memory than their
    names, and an interrupted run would wait for them.
    """
    waiting: deque[Future[T]] = deque()
    with ignoring_oddities(), ThreadPoolExecutor() as pool:
        for file in files:
            waiting.append(pool.submit(function, file))
            if len(waiting) == under_way:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _inspect(path: str) -> str | Skipped:
    """Its hash, or why it cannot be decoded."""
    try:
        content = read_bytes(path)
    except ImageError as error:
        return Skipped(path, error.reason)
    problem = find_problem(path, content)
    return Skipped(path, problem) if problem else hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- splitting


def split(samples: Samples, val_fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Stratified (train, val), a function of file contents, `val_fraction` and `seed` alone.

    Files rank by a hash of (seed, content), so names, order and the training seed do not matter.
    Exact duplicates share that hash and stay on one side, also across classes: a content counts
    for the class in which it is first seen.

    Raises:
        CnnftError: a class has fewer than two different images.
    """
    home: dict[str, int] = {}
    for digest, label in zip(samples.hashes, samples.labels, strict=True):
        home.setdefault(digest, label)
    contents_of: list[list[str]] = [[] for _ in samples.classes]
    for digest, label in home.items():
        contents_of[label].append(digest)
    val_hashes: set[str] = set()
    for name, contents in zip(samples.classes, contents_of, strict=True):
        if len(contents) < 2:
            raise CnnftError(
                f"class {name} has {len(contents)} different image(s) that no other class has: at "
                "least 2 are needed to split off a validation part; add images, or give train and "
                "val folders"
            )
        contents.sort(key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        count = min(max(round(val_fraction * len(contents)), 1), len(contents) - 1)
        val_hashes.update(contents[:count])
    in_val = [digest in val_hashes for digest in samples.hashes]
    return (
        samples.take(i for i, chosen in enumerate(in_val) if not chosen),
        samples.take(i for i, chosen in enumerate(in_val) if chosen),
    )


def without(samples: Samples, hashes: Iterable[str]) -> Samples:
    """The samples whose content is not among `hashes`."""
    excluded = set(hashes)
    return samples.take(i for i, digest in enumerate(samples.hashes) if digest not in excluded)
