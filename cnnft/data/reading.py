"""A source -> a `Dataset`: every file is read once, decoded and hashed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from cnnft.data.dataset import UNKNOWN, Dataset, Samples, Skipped, SplitName
from cnnft.data.folders import OnFiles
from cnnft.data.images import (
    ImageError,
    decode,
    find_problem,
    ignoring_oddities,
    mode_of,
    read_bytes,
)
from cnnft.data.layouts import some
from cnnft.data.names import is_named_as_image
from cnnft.data.sources import Source, open_source
from cnnft.data.threads import READ_TIMEOUT, in_threads
from cnnft.errors import CnnftError
from cnnft.machine import distributed

T = TypeVar("T")


def read_dataset(
    source: str | Path | Source,
    splits: Sequence[SplitName] = ("train", "val", "test"),
    *,
    classes: tuple[str, ...] | None = None,
    on_files: OnFiles = lambda count, total: None,
    read_timeout: float = READ_TIMEOUT,
) -> Dataset:
    """The labelled images of a source that can be decoded, in the order of `Samples.in_order`.

    A folder is read in the layout that it seems to have; `open_source` reads it in another.

    Args:
        splits: which to read, of those that the source separates.
        classes: those of a model, which labels are to follow. None: the training images', of which
            there must be two or more.
        on_files: see `OnFiles`.
        read_timeout: seconds to wait for a file.

    Raises:
        UsageError: there is no such source.
        CnnftError: it holds no classes, or, in train, in val or beside those of a model, others.
    """
    found = _find(source, splits, classes, on_files)
    return _decode_all(found, _require_decodable, on_files, read_timeout)[0]


def inspect_dataset(
    source: str | Path | Source,
    inspect: Callable[[Image.Image, str], T],
    splits: Sequence[SplitName] = ("train", "val", "test"),
    *,
    on_files: OnFiles = lambda count, total: None,
    read_timeout: float = READ_TIMEOUT,
) -> tuple[Dataset, dict[str, T]]:
    """`read_dataset`, and what `inspect` finds in each image, by path: decoded once for both.

    `inspect` is called in threads, with the upright RGB image and the colour mode of its file.
    """

    def look(path: str, content: bytes) -> T:
        return inspect(decode(path, content), mode_of(path, content))

    return _decode_all(_find(source, splits, None, on_files), look, on_files, read_timeout)


def _find(
    source: str | Path | Source,
    splits: Sequence[SplitName],
    classes: tuple[str, ...] | None,
    on_files: OnFiles,
) -> Dataset:
    """Nothing is read yet: it has no hashes, and `skipped` what can be told by names."""
    if isinstance(source, str | Path):
        source = open_source(source, classes=classes or (), on_files=on_files)
    known = _training_classes(source) if classes is None else classes
    skipped = source.left_out()
    notes: list[str] = []
    found: dict[SplitName, Samples] = {}
    for split in (name for name in source.splits if name in splits):
        found[split], others = source.files(split, known)
        if classes is not None or split != "test":  # training never reads test
            nested = source.nested if classes is not None and not len(found[split]) else ""
            _require_known(others, known, nested)
        skipped += others
        notes += source.notes(split, known)
    if not any(map(len, found.values())):
        for split in found:
            source.classes(split)  # says so where there are none
    return Dataset(source.name, found, tuple(skipped), tuple(notes))


def _training_classes(source: Source) -> tuple[str, ...]:
    if "train" not in source.splits:
        other = source.splits[0]
        raise CnnftError(
            f"{source.name} has {other} but no train folder that holds class folders: add training "
            f"images, or give --layout flat if {other} is a class"
        )
    classes = source.classes("train")
    if len(classes) < 2:
        raise CnnftError(
            f"{source.name} has one class only ({classes[0]}), and a classifier needs at least two"
            f"{source.hint}"
        )
    return classes


def _require_known(skipped: Sequence[Skipped], classes: tuple[str, ...], nested: str) -> None:
    """Most often the name of a class is misspelt: to go on without it would score another thing."""
    for unknown in (entry for entry in skipped if entry.reason == UNKNOWN):
        raise CnnftError(
            f"{unknown.path} is no class of the training data ({some(classes)})"
            + (nested or ": rename or remove the folder")
        )


def _decode_all(
    found: Dataset, look: Callable[[str, bytes], T], on_files: OnFiles, read_timeout: float
) -> tuple[Dataset, dict[str, T]]:
    """Those that can be decoded, with their hashes and what `look` gives; processes share the
    work. `look(path, content)` raises `ImageError` where one cannot be.
    """

    def read(path: str) -> tuple[str, T] | Skipped:
        try:
            content = read_bytes(path)
            return hashlib.sha256(content).hexdigest(), look(path, content)
        except ImageError as error:
            return Skipped(path, error.reason, images=int(is_named_as_image(path)))

    total = sum(map(len, found.splits.values()))
    skipped = list(found.skipped)
    splits: dict[SplitName, Samples] = {}
    facts: dict[str, T] = {}
    for split, samples in found.splits.items():
        files: list[tuple[str, T] | Skipped] = []
        share = distributed.shard(len(samples))
        mine = samples.paths[share.start : share.stop]
        with ignoring_oddities():
            for file in in_threads(read, mine, read_timeout):
                files.append(file)
                on_files(1, total)
        files = distributed.gather(files)
        good = {i: file for i, file in enumerate(files) if not isinstance(file, Skipped)}
        skipped += [file for file in files if isinstance(file, Skipped)]
        hashes = tuple(digest for digest, _ in good.values())
        splits[split] = replace(samples.take(good), hashes=hashes).in_order()
        facts |= {samples.paths[i]: fact for i, (_, fact) in good.items()}
    by_path = tuple(sorted(skipped, key=lambda file: file.path))
    return replace(found, splits=splits, skipped=by_path), facts


def _require_decodable(path: str, content: bytes) -> None:
    if problem := find_problem(path, content):
        raise ImageError(path, problem)
