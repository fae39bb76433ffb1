"""Mean and standard deviation of the channels of a dataset."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cnnft.config.texts import Channels
from cnnft.data.loading import Loading, view_batches
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import CnnftError
from cnnft.machine import distributed


@dataclass(frozen=True)
class ChannelSums:
    """Of some pixels, by channel: red, green, blue; in double precision."""

    values: Tensor
    """(3,), 255 being 1."""
    squares: Tensor
    pixels: int

    @classmethod
    def of(cls, pixels: Tensor) -> "ChannelSums":
        """Of pixels (3, N)."""
        pixels = pixels.double()
        return cls(pixels.sum(dim=1), pixels.square().sum(dim=1), pixels.shape[1])

    @classmethod
    def total(cls, parts: Iterable["ChannelSums"]) -> "ChannelSums":
        values, squares, pixels = torch.zeros(3).double(), torch.zeros(3).double(), 0
        for part in parts:
            values, squares = values + part.values, squares + part.squares
            pixels += part.pixels
        return cls(values, squares, pixels)

    def mean_and_std(self) -> tuple[Channels, Channels]:
        mean = self.values / self.pixels
        std = (self.squares / self.pixels - mean.square()).clamp(min=1e-8).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


def without_padding(spec: InputSpec) -> InputSpec:
    """What a network sees of an image, but for padding, which is no part of it."""
    return replace(spec, fit="squash") if spec.fit == "pad" else spec


def channel_statistics(
    paths: Sequence[str | Path], spec: InputSpec, loading: Loading
) -> tuple[Channels, Channels]:
    """(mean, std) of red, green and blue over the images as evaluation sees them, 255 being 1.

    Raises:
        CnnftError: a file cannot be read.
    """
    plain = replace(without_padding(spec), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def sums() -> Iterator[ChannelSums]:
        for batch in view_batches(paths, EvaluationViews(plain), loading):
            for index, reason in batch.unreadable.items():
                raise CnnftError(f"{paths[index]} {reason}: the data changed meanwhile")
            assert batch.pixels is not None
            yield ChannelSums.of(batch.pixels.transpose(0, 2).flatten(1))

    mine = ChannelSums.total(sums())
    return ChannelSums.total(distributed.gather([mine])).mean_and_std()
