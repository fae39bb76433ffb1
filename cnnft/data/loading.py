"""`Samples` -> batches: datasets and loaders for training and for views."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from cnnft.config.optimization import TrainingConfig
from cnnft.data.dataset import Samples
from cnnft.data.images import FULL, ImageError, PixelSpec, read_image
from cnnft.data.sampler import IGNORED, Key, keyed_seed
from cnnft.data.threads import READ_TIMEOUT, in_threads
from cnnft.data.transforms import InputSpec, evaluation_crop
from cnnft.data.workers import FILES, Workers
from cnnft.errors import CnnftError, first_line
from cnnft.machine import distributed
from cnnft.machine.limits import open_files_left

_LOADERS = 3  # that have workers at the same time: training, BatchNorm statistics, validation
_OWN_FILES = 16  # open files that reading and writing take

_log = logging.getLogger(__name__)

K = TypeVar("K")
B = TypeVar("B")


@dataclass(frozen=True)
class Loading:
    """Batch size and worker processes of a data loader."""

    batch_size: int
    workers: int
    pinned: bool = False
    """In page-locked memory, which a GPU copies from while it computes."""
    read_timeout: float = READ_TIMEOUT
    """Seconds to wait for a batch from when it is needed."""


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
    read_timeout: float = READ_TIMEOUT
    """Seconds to wait for one, where they are read by threads."""

    def __getitem__(self, index: int) -> Image.Image:
        path = self.paths[index]
        return self.decoded.get(str(path)) or self.cropped(read_image(path, self.pixels))

    def cropped(self, image: Image.Image) -> Image.Image:
        return image if self.crop is None else evaluation_crop(image, self.crop)


class TrainingImages:
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

    def batch(self, keys: Iterable[Key]) -> tuple[Tensor, Tensor] | str:
        """(pixels (B, 3, H, W), labels (B,)), or why a file cannot be read."""
        return _stack_training([self[key] for key in keys])

    def files(self, keys: Iterable[Key]) -> list[str]:
        return [self.samples.paths[max(index, ~index)] for _, index, *_ in keys]


class Batches(Generic[K, B]):
    """`fetch(key)` of each key, in order, by worker processes or by a thread.

    May be iterated again; workers stay alive in between.
    """

    def __init__(
        self,
        fetch: Callable[[K], B],
        keys: Iterable[K],
        files: Callable[[K], list[str]],
        loading: Loading,
    ) -> None:
        """`files`: what is read for a key, to say what did not arrive."""
        self.fetch, self.keys, self.files, self.loading = fetch, keys, files, loading
        self._workers: Workers[K, B] | None = None

    def __iter__(self) -> Iterator[B]:
        limit = self.loading.read_timeout
        if self.loading.workers and self._workers is None:
            try:
                self._workers = Workers(self.fetch, self.loading.workers, self.loading.pinned)
            except (OSError, RuntimeError) as error:
                raise CnnftError(
                    f"no process can be started that loads images ({first_line(error)}): --workers "
                    "0 goes without"
                ) from error
        if self._workers is None:
            # One thread, which computes while this one waits: torch's generator is shared.
            yield from in_threads(self._fetch, self.keys, limit, names=self.files, under_way=1)
            return
        try:
            yield from self._workers.map(self.keys, limit, self.files)
        finally:
            if not self._workers.alive:
                self._workers = None

    def _fetch(self, key: K) -> B:
        batch = self.fetch(key)
        return _pinned(batch) if self.loading.pinned else batch


class TrainingBatches:
    """(pixels (B, 3, H, W), labels (B,)) of each key; may be iterated again, as `Batches` may.

    Raises, when iterated:
        CnnftError: a file that could be read before training cannot be read now, or not in time.
    """

    def __init__(
        self, dataset: TrainingImages, keys: Iterable[list[Key]], loading: Loading
    ) -> None:
        self._batches = Batches(dataset.batch, keys, dataset.files, loading)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
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
    """A batch of images, each in V views (test-time augmentation), with their positions."""

    indices: list[int]
    """Positions of the readable images in the list of files."""
    pixels: Tensor | None
    """(len(indices), V, 3, H, W); None where no image could be read."""
    unreadable: dict[int, str]
    """Position -> why the file cannot be read."""


class ViewedImages:
    """`dataset[index]` -> (index, views (V, 3, H, W) or why the file cannot be read)."""

    def __init__(self, images: Images, views: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.views = images, views

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.views(self.images[index])
        except ImageError as error:
            return index, error.reason

    def batch(self, indices: Iterable[int]) -> Views:
        return _stack_views([self[index] for index in indices])


def view_batches(
    paths: Sequence[str | Path],
    views: Callable[[Image.Image], Tensor],
    loading: Loading,
    images: Images | None = None,
) -> Batches[range, Views]:
    """This process's shard of the files, each once, in order; or of `images` made from them.

    May be iterated again; workers stay alive in between.
    """
    dataset = ViewedImages(images or ImageFiles(paths), views)
    shard, size = distributed.shard(len(paths)), loading.batch_size
    keys = [shard[start : start + size] for start in range(0, len(shard), size)]
    return Batches(dataset.batch, keys, lambda key: [str(paths[i]) for i in key], loading)


def _pinned(batch: Any) -> Any:
    """`batch` with its tensors in page-locked memory."""
    if not isinstance(batch, tuple):
        return batch
    fields: list[Any] = [
        value.pin_memory() if isinstance(value, Tensor) else value for value in batch
    ]
    return Views(*fields) if isinstance(batch, Views) else tuple(fields)


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
    """None: half of the processors that this process may use, at most 8; the rest compute.

    Fewer where the system allows too few open files.
    """
    if requested is None:
        allowed = getattr(os, "sched_getaffinity", None)
        count = len(allowed(0)) if allowed else os.cpu_count() or 1
        requested = min(count // 2 // distributed.local_world_size, 8)
    left = open_files_left() - _OWN_FILES
    possible = int(max(min(left / (_LOADERS * FILES), requested), 0))
    if possible < requested:
        _log.warning(
            "%d of %d workers: this process may have too few open files for more (ulimit -n)",
            *(possible, requested),
        )
    return possible
