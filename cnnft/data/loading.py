"""`Samples` -> batches: datasets and loaders for training and for views."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cnnft.config.optimization import TrainingConfig
from cnnft.data.dataset import Samples
from cnnft.data.images import FULL, ImageError, PixelSpec, read_image
from cnnft.data.sampler import IGNORED, Key, keyed_seed
from cnnft.data.transforms import InputSpec, evaluation_crop
from cnnft.errors import CnnftError
from cnnft.machine import distributed


@dataclass(frozen=True)
class Loading:
    """Batch size and worker processes of a data loader."""

    batch_size: int
    workers: int
    pinned: bool = False
    """In page-locked memory, which a GPU copies from while it computes."""


class Images(Protocol):
    """`images[index]`: the image of a sample; raises `ImageError` where it cannot be read."""

    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class ImageFiles:
    """Files that are decoded whenever they are asked for."""

    paths: Sequence[str | Path]
    pixels: PixelSpec = FULL
    crop: InputSpec | None = None
    """Where given, the image is what evaluation sees of it, size × size."""
    decoded: Mapping[str, Image.Image] = field(default_factory=dict)
    """Path -> the image, where it was decoded before."""

    def __getitem__(self, index: int) -> Image.Image:
        path = self.paths[index]
        return self.decoded.get(str(path)) or self.cropped(read_image(path, self.pixels))

    def cropped(self, image: Image.Image) -> Image.Image:
        return image if self.crop is None else evaluation_crop(image, self.crop)


class TrainingImages(Dataset[tuple[Tensor, int] | str]):
    """`dataset[key]` -> (pixels (3, H, W), label): the same for the same key, anywhere.

    The key seeds the random transform for that one sample, so neither the number of workers nor
    the order of loading changes it. (Telling an epoch to a dataset that persistent workers have
    copied has no effect: the epoch has to travel with the index.) In the seed the image's name
    stands for the index, so that views stay the same when other images come or go.

    A file that cannot be read any more gives the reason: an exception would reach the main
    process wrapped in the worker's traceback.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        images: Images | None = None,
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self.names = samples.names  # made once, for all workers
        self.images = images or ImageFiles(samples.paths)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        epoch, index, *place = key
        try:
            counted, index = index >= 0, max(index, ~index)
            image = self.images[index]
        except ImageError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            seed = keyed_seed("sample", self.seed, epoch, self.names[index], *place)
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.samples.labels[index] if counted else IGNORED


def training_batches(
    dataset: TrainingImages, keys: Iterable[list[Key]], loading: Loading
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels (B, 3, H, W), labels (B,)) for all keys: workers start once.

    Raises:
        CnnftError: a file that could be read before training cannot be read now.
    """
    for batch in DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=loading.workers,
        pin_memory=loading.pinned,
        generator=torch.Generator(),  # else it draws from the caller's
        collate_fn=_stack_training,
        worker_init_fn=_leave_signals_alone,
    ):
        if isinstance(batch, str):
            raise CnnftError(f"{batch}: the data changed while training")
        yield batch


def _leave_signals_alone(worker: int) -> None:
    """Ctrl-C, and torchrun's SIGTERM, reach whole groups: the main process decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stack_training(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    pixels, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


class Views(NamedTuple):
    """A batch of images, each in V views (test-time augmentation), with their positions."""

    indices: list[int]
    """Positions of the readable images in the list of files."""
    pixels: Tensor | None
    """(len(indices), V, 3, H, W); None where no image could be read."""
    unreadable: dict[int, str]
    """Position -> why the file cannot be read."""


class ViewedImages(Dataset[tuple[int, Tensor | str]]):
    """`dataset[index]` -> (index, views (V, 3, H, W) or why the file cannot be read)."""

    def __init__(self, images: Images, views: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.views = images, views

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.views(self.images[index])
        except ImageError as error:
            return index, error.reason


ViewLoader = DataLoader[Views]


def view_batches(
    paths: Sequence[str | Path],
    views: Callable[[Image.Image], Tensor],
    loading: Loading,
    images: Images | None = None,
) -> ViewLoader:
    """This process's shard of the files, each once, in order; or of `images` made from them.

    May be iterated again; workers stay alive in between.
    """
    return DataLoader(
        ViewedImages(images or ImageFiles(paths), views),  # type: ignore[arg-type]  # see collate_fn
        batch_size=loading.batch_size,
        sampler=distributed.shard(len(paths)),
        num_workers=loading.workers,
        persistent_workers=loading.workers > 0,
        pin_memory=loading.pinned,
        generator=torch.Generator(),
        collate_fn=_stack_views,
        worker_init_fn=_leave_signals_alone,
    )


def _stack_views(items: list[tuple[int, Tensor | str]]) -> Views:
    readable = {i: views for i, views in items if isinstance(views, Tensor)}
    unreadable = {i: reason for i, reason in items if isinstance(reason, str)}
    if not readable:
        return Views([], None, unreadable)
    joined = torch.cat(list(readable.values()))  # which, other than torch.stack, keeps their order
    return Views(list(readable), joined.unflatten(0, (len(readable), -1)), unreadable)


def forward_batch(training: TrainingConfig) -> int:
    """How many images go through the network together in each process."""
    batch = training.batch_size if isinstance(training.batch_size, int) else 32
    own = max(batch // distributed.world_size, 1)
    return min(own, training.micro_batch or own)


def worker_count(requested: int | None) -> int:
    """None: half of the processors that this process may use, at most 8; the rest compute."""
    if requested is not None:
        return requested
    allowed = getattr(os, "sched_getaffinity", None)
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return min(count // 2 // distributed.local_world_size, 8)
