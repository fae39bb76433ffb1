"""`read_dataset`: a source -> a `Dataset`; every file is read once, decoded and hashed."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cnnft.config.choices import Layout
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName
from cnnft.data.images import ImageError, find_problem, ignoring_oddities, read_bytes
from cnnft.data.sources import OnFiles, Source, open_source
from cnnft.errors import CnnftError
from cnnft.machine import distributed

_UNDER_WAY = 256  # files: enough for every thread to have work while the first is waited for

S = TypeVar("S")
T = TypeVar("T")


def read_dataset(
    source: str | Path | Source,
    splits: Sequence[SplitName] = ("train", "val", "test"),
    *,
    layout: Layout = "auto",
    classes: tuple[str, ...] | None = None,
    on_files: OnFiles = lambda count, total: None,
) -> Dataset:
    """The labelled images of a source that can be decoded, in the order of `Samples.in_order`.

    Args:
        splits: which to read, of those that the source separates.
        classes: those of a model, which labels are to follow. None: the training images', of which
            there must be two or more, with images of each in train and val.
        on_files: see `OnFiles`.

    Raises:
        UsageError: there is no such source.
        CnnftError: it holds no classes, or others than train, or a class without images.
    """
    opened = open_source(source, layout) if isinstance(source, str | Path) else source
    known = _training_classes(opened) if classes is None else classes
    skipped: list[Skipped] = []
    found: dict[SplitName, Samples] = {}
    for split in (name for name in opened.splits if name in splits):
        found[split], others = opened.files(split, known, on_files)
        skipped += others
        if classes is None and split != "test":
            _require_images(found[split], opened, split)
    total = sum(map(len, found.values()))
    for split, samples in found.items():
        found[split], unreadable = _decode_all(samples, lambda: on_files(1, total))
        skipped += unreadable
    return Dataset(opened.name, found, tuple(sorted(skipped, key=lambda file: file.path)))


def _training_classes(source: Source) -> tuple[str, ...]:
    if "train" not in source.splits:
        other = Path(source.name, source.splits[0])
        raise CnnftError(
            f"{source.name} has {other.name} but no train folder: put the training images into "
            f"{other.parent / 'train'}, or give --layout flat if {other.name} is a class"
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


def _decode_all(samples: Samples, on_file: Callable[[], object]) -> tuple[Samples, list[Skipped]]:
    """Those that can be decoded, with their hashes; and the others. Processes share the work."""
    found: list[str | Skipped] = []
    share = distributed.shard(len(samples))
    for inspected in in_threads(_inspect, samples.paths[share.start : share.stop]):
        found.append(inspected)
        on_file()
    found = distributed.gather(found)
    readable = samples.take(i for i, file in enumerate(found) if isinstance(file, str))
    hashes = tuple(digest for digest in found if isinstance(digest, str))
    skipped = [file for file in found if isinstance(file, Skipped)]
    return replace(readable, hashes=hashes).in_order(), skipped


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
