"""Mean and standard deviation of the channels of a dataset."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cnnft.config.choices import Fit
from cnnft.config.texts import Channels
from cnnft.data.loading import Loading, view_batches
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import CnnftError
from cnnft.machine import distributed


def channel_statistics(
    paths: Sequence[str | Path], spec: InputSpec, loading: Loading
) -> tuple[Channels, Channels]:
    """(mean, std) of red, green and blue over the images as evaluation sees them, 255 being 1.

    Raises:
        CnnftError: a file cannot be read.
    """
    fit: Fit = "squash" if spec.fit == "pad" else spec.fit  # padding is no part of the images
    plain = EvaluationViews(replace(spec, fit=fit, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    total, squares, count = torch.zeros(3).double(), torch.zeros(3).double(), 0
    for batch in view_batches(paths, plain, loading):
        for index, reason in batch.unreadable.items():
            raise CnnftError(f"{paths[index]} {reason}: the data changed meanwhile")
        assert batch.pixels is not None
        pixels = batch.pixels.double().transpose(0, 2).flatten(1)
        total, squares = total + pixels.sum(dim=1), squares + pixels.square().sum(dim=1)
        count += pixels.shape[1]
    total, squares = distributed.all_reduce_sum(total), distributed.all_reduce_sum(squares)
    count = int(distributed.all_reduce_sum(torch.tensor(count)))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
