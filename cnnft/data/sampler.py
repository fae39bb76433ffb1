"""The batch sampler: which images make up which step, a pure function of the seed."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cnnft.machine import distributed

Key = tuple[int, ...]
"""(epoch, index): names one random view of one training image; (epoch, index, place in the epoch)
where sampling with replacement may repeat it. ~index stands for the same image as padding, which
the loss ignores."""

IGNORED = -100
"""The label of an image that does not count: `ignore_index` of cross_entropy."""


class BalancedDraw:
    """Class-balanced sampling with replacement: draws first a class, then one of its images.
    (torch.multinomial, behind WeightedRandomSampler, takes 2^24 images at most.)
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
    Iteration gives this process's shard of each batch, and an ignored image where the shard is
    empty.
    """

    images: int
    batch_size: int
    seed: int
    epochs: int
    first_step: int = 0
    """Where iteration begins: the steps before it were taken by a run that was interrupted."""
    draw: BalancedDraw | None = None
    views: int | None = None
    """How many of each image there are, in place of epochs. None: a new one in every epoch."""

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.images, self.batch_size)
        return max(full + (rest > 1), 1)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.part, range(self.first_step, len(self)))

    def part(self, step: int) -> list[Key]:
        """This process's keys of a step; one that is ignored where there is none."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch, places = self.at(step), self._places(within)
        share = distributed.shard(len(batch))
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


def keyed_seed(*key: object) -> int:
    """A 63-bit seed for `key`: independent streams for what is named differently."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
