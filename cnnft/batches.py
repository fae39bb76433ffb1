"""`Samples` -> batches: datasets, the keyed sampler, loaders for training and for views."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cnnft import distributed
from cnnft.config import Fit
from cnnft.data import Samples
from cnnft.errors import CnnftError
from cnnft.images import FULL, ImageError, PixelSpec, read_image
from cnnft.transforms import EvaluationViews, InputSpec, evaluation_crop
from cnnft.values import Channels

Key = tuple[int, ...]
"""(epoch, index): names one random view of one training image; (epoch, index, place in the epoch)
where an epoch may have the image again. ~index stands for the same image where it is not to
count."""

IGNORED = -100
"""The label of an image that does not count, as `torch.nn.functional.cross_entropy` has it."""


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

    def __getitem__(self, index: int) -> Image.Image:
        return self.cropped(read_image(self.paths[index], self.pixels))

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


class BalancedDraw:
    """Draws images with replacement, each class as likely as any other: first a class, then one
    of its images. (torch.multinomial takes weights of images, but of 2^24 at most.)
    """

    def __init__(self, labels: Sequence[int]) -> None:
        classes = torch.tensor(labels)
        self._by_class = classes.argsort(stable=True)
        self._sizes = classes.unique(return_counts=True)[1]
        self._starts = self._sizes.cumsum(0) - self._sizes

    def __call__(self, generator: torch.Generator) -> Tensor:
        """As many as there are images, as indices (N,)."""
        count = (len(self._by_class),)
        drawn = torch.randint(len(self._sizes), count, generator=generator)
        share = torch.rand(count, dtype=torch.float64, generator=generator)
        return self._by_class[self._starts[drawn] + (share * self._sizes[drawn]).long()]


@dataclass(frozen=True)
class KeyedBatches(Sampler[list[Key]]):
    """All batches of a training run, as keys: a pure function of (seed, epoch, step).

    Every image occurs once an epoch, unless a `draw` says which do. The last batch may be smaller,
    but never a single image, which BatchNorm cannot train on: that one joins the batch before it.
    Iteration gives this process's share of each batch, and an image that does not count where the
    share is empty.
    """

    images: int
    batch_size: int
    seed: int
    epochs: int
    first_step: int = 0
    """Where iteration begins: the steps before it were taken by a run that was interrupted."""
    draw: BalancedDraw | None = None
    views: int | None = None
    """Of each image; the keys have them for epochs. None: a new one in every epoch."""

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return max(full + (rest > 1), 1)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.part, range(self.first_step, len(self)))

    def part(self, step: int) -> list[Key]:
        """This process's keys of a step; one that does not count where there is none."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch, places = self.at(step), self._places(within)
        share = distributed.share(len(batch))
        keys = [self._key(epoch, batch[i], places[i]) for i in share]
        return keys or [self._key(epoch, ~batch[0], places[0])]

    def at(self, step: int) -> list[int]:
        """The images of a step, in all processes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        places = self._places(within)
        return _order(self.images, self.seed, epoch, self.draw)[places.start : places.stop]

    def own(self, step: int) -> list[int]:
        """The images of this process's keys."""
        return [max(index, ~index) for _, index, *_ in self.part(step)]

    def size(self, step: int) -> int:
        """How many images the step has, in all processes."""
        return len(self._places(step % self.steps_per_epoch))

    def _key(self, epoch: int, index: int, place: int) -> Key:
        if self.views is not None:
            return (epoch if self.draw is None else epoch + place) % self.views, index
        return (epoch, index) if self.draw is None else (epoch, index, place)

    def _places(self, within: int) -> range:
        last = within == self.steps_per_epoch - 1
        stop = self.images if last else (within + 1) * self.batch_size
        return range(within * self.batch_size, stop)


@lru_cache(maxsize=2)  # each step asks for it
def _order(images: int, seed: int, epoch: int, draw: BalancedDraw | None) -> list[int]:
    generator = torch.Generator().manual_seed(keyed_seed("order", seed, epoch))
    order = draw(generator) if draw else torch.randperm(images, generator=generator)
    indices: list[int] = order.tolist()
    return indices


def training_batches(
    dataset: TrainingImages, keys: Iterable[list[Key]], workers: int, *, pinned: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels (B, 3, H, W), labels (B,)) for all keys: workers start once.

    `pinned`: in memory that a GPU copies from while it computes.

    Raises:
        CnnftError: a file that could be read before training cannot be read now.
    """
    for batch in DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pinned,
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
    """A batch of images, each seen in V ways, that knows which images they are."""

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
    batch_size: int,
    workers: int,
    images: Images | None = None,
    *,
    pinned: bool = False,
) -> ViewLoader:
    """This process's share of the files, each once, in order; or of `images` made from them.

    May be iterated again; workers stay alive in between.
    """
    return DataLoader(
        ViewedImages(images or ImageFiles(paths), views),  # type: ignore[arg-type]  # see collate_fn
        batch_size=batch_size,
        sampler=distributed.share(len(paths)),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pinned,
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


def channel_statistics(
    paths: Sequence[str | Path], spec: InputSpec, batch_size: int, workers: int
) -> tuple[Channels, Channels]:
    """(mean, std) of red, green and blue over the images as evaluation sees them, 255 being 1.

    Raises:
        CnnftError: a file cannot be read.
    """
    fit: Fit = "squash" if spec.fit == "pad" else spec.fit  # padding is no part of the images
    plain = EvaluationViews(replace(spec, fit=fit, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    total, squares, count = torch.zeros(3).double(), torch.zeros(3).double(), 0
    for batch in view_batches(paths, plain, batch_size, workers):
        for index, reason in batch.unreadable.items():
            raise CnnftError(f"{paths[index]} {reason}: the data changed meanwhile")
        assert batch.pixels is not None
        pixels = batch.pixels.double().transpose(0, 2).flatten(1)
        total, squares = total + pixels.sum(dim=1), squares + pixels.square().sum(dim=1)
        count += pixels.shape[1]
    total, squares = distributed.total(total), distributed.total(squares)
    count = int(distributed.total(torch.tensor(count)))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for `key`: independent streams for what is named differently."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def default_workers() -> int:
    """Half of the processors that this process may use, at most 8: the rest compute."""
    allowed = getattr(os, "sched_getaffinity", None)
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return min(count // 2 // distributed.local_world, 8)
