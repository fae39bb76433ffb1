"""A folder of images -> `Samples`: classes, the train/val split, datasets and keyed batches."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cnnft.errors import CnnftError, UsageError
from cnnft.images import SUFFIXES, ImageError, find_problem, read_image

Key = tuple[int, int]
"""(epoch, index): names one random view of one training image."""

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Samples:
    """Labelled image files; `hashes` (SHA-256 of the content) is filled in by `check`."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    hashes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> "Samples":
        chosen = list(indices)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            hashes=tuple(self.hashes[i] for i in chosen) if self.hashes else (),
        )

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
    )


# ---------------------------------------------------------------- finding the files


def image_files(folder: Path) -> list[Path]:
    """Image files below `folder`, in the order of torchvision's ImageFolder; hidden ones excluded.

    Symbolic links are followed, each real folder once, so that a loop ends.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _ignored(name)]
        found += [
            Path(root, name)
            for name in names
            if not _ignored(name) and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in {"__MACOSX", "Thumbs.db", "desktop.ini"}


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted as torchvision's ImageFolder sorts them."""
    return tuple(
        sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not _ignored(entry.name)
        )
    )


def find_split(data: Path, split: str) -> Path | None:
    """The folder `data`/train, val (or valid) or test, if there is one."""
    return next((data / n for n in SPLIT_FOLDERS[split] if (data / n).is_dir()), None)


def require_folder(data: str | Path) -> Path:
    folder = Path(data)
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the folder that holds the class folders")
    return folder


def scan(folder: Path, classes: tuple[str, ...] | None = None) -> Samples:
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
    if classes is None:
        classes = found
    elif unknown := sorted(set(found) - set(classes)):
        raise CnnftError(
            f"{folder / unknown[0]} is no class of the training data ({_some(classes)}): "
            "rename or remove the folder"
        )
    files = [(path, classes.index(name)) for name in found for path in image_files(folder / name)]
    files.sort(key=lambda pair: pair[1])  # stable: by class, then by name
    return Samples(tuple(path for path, _ in files), tuple(label for _, label in files), classes)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def scan_training_data(data: Path) -> tuple[Samples, Samples | None]:
    """(train, val) of `data`; val is None where the folder does not separate one.

    Raises:
        CnnftError: fewer than two classes, an empty class, or val classes that differ from train.
    """
    folder = find_split(data, "train") or data
    val_folder = find_split(data, "val")
    if folder == data and val_folder is not None:
        raise CnnftError(f"{data} has {val_folder.name} but no train folder: add {data / 'train'}")
    train = scan(folder)
    if len(train.classes) < 2:
        raise CnnftError(
            f"{folder} has one class only ({train.classes[0]}): a classifier needs at least two "
            "class folders"
        )
    _require_images(train, folder)
    if folder == data or val_folder is None:
        return train, None
    val = scan(val_folder, train.classes)
    _require_images(val, val_folder)
    return train, val


def _require_images(samples: Samples, folder: Path) -> None:
    for name, count in zip(samples.classes, samples.counts(), strict=True):
        if count == 0:
            where = folder / name
            what = "holds no images" if where.is_dir() else "is missing"
            raise CnnftError(
                f"{where} {what} ({', '.join(sorted(SUFFIXES))}): every class needs some in "
                f"{folder.name}; add images or remove the class everywhere"
            )


# ---------------------------------------------------------------- reading them once


@dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why."""

    path: Path
    reason: str


def check(
    samples: Samples, *, on_file: Callable[[], object] = lambda: None
) -> tuple[Samples, list[Skipped]]:
    """Read every file once: its hash, and whether it can be decoded. Returns (good ones, the rest).

    `on_file` is called after each file. Threads suffice: Pillow decodes outside Python's lock.
    """
    good: list[int] = []
    hashes: list[str] = []
    skipped: list[Skipped] = []
    with ThreadPoolExecutor() as pool:
        for i, (digest, reason) in enumerate(pool.map(_inspect, samples.paths)):
            if reason is None:
                good.append(i)
                hashes.append(digest)
            else:
                skipped.append(Skipped(samples.paths[i], reason))
            on_file()
    return replace(samples.take(good), hashes=tuple(hashes)), skipped


def _inspect(path: Path) -> tuple[str, str | None]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    return hashlib.sha256(content).hexdigest(), find_problem(path, content)


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
    val_hashes: set[str] = set()
    for label, name in enumerate(samples.classes):
        contents = [digest for digest, owner in home.items() if owner == label]
        if len(contents) < 2:
            raise CnnftError(
                f"class {name} has {len(contents)} different image(s): at least 2 are needed to "
                "split off a validation part; add images, or give train and val folders"
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


# ---------------------------------------------------------------- batches


class TrainingImages(Dataset[tuple[Tensor, int] | str]):
    """`dataset[epoch, index]` -> (pixels (3, H, W), label): the same for the same key, anywhere.

    The key seeds the random transform for that one sample, so neither the number of workers nor
    the order of loading changes it. (Telling an epoch to a dataset that persistent workers have
    copied has no effect: the epoch has to travel with the index.)

    A file that cannot be read any more gives the reason: an exception would reach the main
    process wrapped in the worker's traceback.
    """

    def __init__(
        self, samples: Samples, transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        epoch, index = key
        try:
            image = read_image(self.samples.paths[index])
        except ImageError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(keyed_seed("sample", self.seed, epoch, index))
            return self.transform(image), self.samples.labels[index]


@dataclass(frozen=True)
class KeyedBatches(Sampler[list[Key]]):
    """All batches of a training run, as keys: a pure function of (seed, epoch, step).

    Every image occurs once an epoch. The last batch may be smaller, but never a single image,
    which BatchNorm cannot train on: that one joins the batch before it.
    """

    images: int
    batch_size: int
    seed: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return max(full + (rest > 1), 1)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in range(self.epochs):
            order = self.order(epoch)
            for step in range(self.steps_per_epoch):
                last = step == self.steps_per_epoch - 1
                stop = None if last else (step + 1) * self.batch_size
                yield [(epoch, index) for index in order[step * self.batch_size : stop]]

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(keyed_seed("order", self.seed, epoch))
        order: list[int] = torch.randperm(self.images, generator=generator).tolist()
        return order


def training_batches(
    dataset: TrainingImages, keys: KeyedBatches, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels (B, 3, H, W), labels (B,)) for all epochs: workers start once.

    Raises:
        CnnftError: a file that could be read before training cannot be read now.
    """
    for batch in DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, collate_fn=_stack_training
    ):
        if isinstance(batch, str):
            raise CnnftError(f"{batch}: the data changed while training")
        yield batch


def _stack_training(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    pixels, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


class Views(NamedTuple):
    """A batch of images, each seen in V ways, that knows which images they are."""

    indices: list[int]
    """Positions of the readable images in the list of files."""
    pixels: Tensor | None
    """(len(indices), V, 3, H, W); None where no image could be read."""
    unreadable: dict[int, str]
    """Position -> why the file cannot be read."""


class ViewedImages(Dataset[tuple[int, Tensor | str]]):
    """`dataset[index]` -> (index, views (V, 3, H, W) or why the file cannot be read)."""

    def __init__(self, paths: Sequence[Path], views: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.views(read_image(self.paths[index]))
        except ImageError as error:
            return index, error.reason


ViewLoader = DataLoader[Views]


def view_batches(
    paths: Sequence[Path],
    views: Callable[[Image.Image], Tensor],
    batch_size: int,
    workers: int,
) -> ViewLoader:
    """Every file once, in order; may be iterated again, workers stay alive in between."""
    return DataLoader(
        ViewedImages(paths, views),  # type: ignore[arg-type]  # collation changes the type
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_stack_views,
    )


def _stack_views(items: list[tuple[int, Tensor | str]]) -> Views:
    readable = {i: views for i, views in items if isinstance(views, Tensor)}
    unreadable = {i: reason for i, reason in items if isinstance(reason, str)}
    pixels = torch.stack(list(readable.values())) if readable else None
    return Views(list(readable), pixels, unreadable)


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for `key`: independent streams for what is named differently."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def default_workers() -> int:
    """Half of the processors that this process may use, at most 8: the rest compute."""
    allowed = getattr(os, "sched_getaffinity", None)
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return min(count // 2, 8)
