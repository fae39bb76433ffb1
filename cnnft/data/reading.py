"""A source -> a `Dataset`: every file is read once, decoded and hashed."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

from cnnft.config.choices import Layout
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName
from cnnft.data.images import (
    ImageError,
    decode,
    find_problem,
    mode_of,
    read_bytes,
)
from cnnft.data.sources import OnFiles, Source, open_source
from cnnft.data.threads import READ_TIMEOUT, in_threads
from cnnft.errors import CnnftError
from cnnft.machine import distributed

T = TypeVar("T")


def read_dataset(
    source: str | Path | Source,
    splits: Sequence[SplitName] = ("train", "val", "test"),
    *,
    layout: Layout = "auto",
    classes: tuple[str, ...] | None = None,
    on_files: OnFiles = lambda count, total: None,
    read_timeout: float = READ_TIMEOUT,
) -> Dataset:
    """The labelled images of a source that can be decoded, in the order of `Samples.in_order`.

    Args:
        splits: which to read, of those that the source separates.
        classes: those of a model, which labels are to follow. None: the training images', of which
            there must be two or more, with images of each in train and val.
        on_files: see `OnFiles`.
        read_timeout: seconds to wait for a file.

    Raises:
        UsageError: there is no such source.
        CnnftError: it holds no classes, or others than train, or a class without images.
    """
    opened = open_source(source, layout) if isinstance(source, str | Path) else source
    found, skipped = _find(opened, splits, classes, on_files)
    reading = _Reading(_require_decodable, on_files, read_timeout)
    dataset, _ = _decode_all(opened.name, found, skipped, reading)
    return dataset


def inspect_dataset(
    source: str | Path | Source,
    inspect: Callable[[Image.Image, str], T],
    splits: Sequence[SplitName] = ("train", "val", "test"),
    *,
    layout: Layout = "auto",
    on_files: OnFiles = lambda count, total: None,
    read_timeout: float = READ_TIMEOUT,
) -> tuple[Dataset, dict[str, T]]:
    """`read_dataset`, and what `inspect` finds in each image, by path: decoded once for both.

    `inspect` is called in threads, with the upright RGB image and the colour mode of its file.
    """

    def look(path: str, content: bytes) -> T:
        return inspect(decode(path, content), mode_of(path, content))

    opened = open_source(source, layout) if isinstance(source, str | Path) else source
    found, skipped = _find(opened, splits, None, on_files)
    return _decode_all(opened.name, found, skipped, _Reading(look, on_files, read_timeout))


def _find(
    source: Source,
    splits: Sequence[SplitName],
    classes: tuple[str, ...] | None,
    on_files: OnFiles,
) -> tuple[dict[SplitName, Samples], list[Skipped]]:
    """The files of each split, and those that are no images by their name."""
    known = _training_classes(source) if classes is None else classes
    skipped: list[Skipped] = []
    found: dict[SplitName, Samples] = {}
    for split in (name for name in source.splits if name in splits):
        found[split], others = source.files(split, known, on_files)
        skipped += others
        if classes is None and split != "test":
            _require_images(found[split], source, split)
    return found, skipped


def _training_classes(source: Source) -> tuple[str, ...]:
    if "train" not in source.splits:
        other = source.splits[0]
        raise CnnftError(
            f"{source.name} has {other} but no train folder: add training images, or give --layout "
            f"flat if {other} is a class"
        )
    classes = source.classes("train")
    if len(classes) < 2:
        raise CnnftError(
            f"{source.name} has one class only ({classes[0]}): a classifier needs at least two "
            "class folders"
        )
    return classes


def _require_images(samples: Samples, source: Source, split: SplitName) -> None:
    for name, count in samples.counts_by_class().items():
        if count == 0:
            what = "holds no images" if name in source.classes(split) else "is missing"
            raise CnnftError(
                f"{source.place(split, name)} {what}: every class needs some in {split}; add "
                "images or remove the class everywhere"
            )


@dataclass(frozen=True)
class _Reading(Generic[T]):
    """How files are read."""

    look: Callable[[str, bytes], T]
    """look(path, content); raises `ImageError` where it cannot be decoded."""
    on_files: OnFiles
    timeout: float


def _decode_all(
    name: str, found: dict[SplitName, Samples], skipped: list[Skipped], reading: _Reading[T]
) -> tuple[Dataset, dict[str, T]]:
    """Those that can be decoded, with their hashes and what `look` gives; processes share the
    work.
    """

    def read(path: str) -> tuple[str, T] | Skipped:
        try:
            content = read_bytes(path)
            return hashlib.sha256(content).hexdigest(), reading.look(path, content)
        except ImageError as error:
            return Skipped(path, error.reason)

    total = sum(map(len, found.values()))
    splits: dict[SplitName, Samples] = {}
    facts: dict[str, T] = {}
    for split, samples in found.items():
        files: list[tuple[str, T] | Skipped] = []
        share = distributed.shard(len(samples))
        for file in in_threads(read, samples.paths[share.start : share.stop], reading.timeout):
            files.append(file)
            reading.on_files(1, total)
        files = distributed.gather(files)
        good = {i: file for i, file in enumerate(files) if not isinstance(file, Skipped)}
        skipped = skipped + [file for file in files if isinstance(file, Skipped)]
        hashes = tuple(digest for digest, _ in good.values())
        splits[split] = replace(samples.take(good), hashes=hashes).in_order()
        facts |= {samples.paths[i]: fact for i, (_, fact) in good.items()}
    by_path = tuple(sorted(skipped, key=lambda file: file.path))
    return Dataset(name, splits, by_path), facts


def _require_decodable(path: str, content: bytes) -> None:
    if problem := find_problem(path, content):
        raise ImageError(path, problem)
