"""Temperature scaling: one number that makes probabilities as sure as they are right."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_RANGE = 20.0
"""The temperature is between 1 / 20 and 20: where all is right, no confidence would be enough."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the mean log-loss."""

    temperature: float
    loss_before: float
    loss: float


def calibrate(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Calibration:
    """The temperature T for which logits / T have the least log-loss (Guo et al., 2017).

    `logits` (N, C) of images that the classifier was not fitted on, `labels` (N,). Without
    `class_weights` (C,) every image weighs the same, whatever it weighed in training: probabilities
    are for data as it comes.
    """
    logits = logits.double()
    weights = None if class_weights is None else class_weights.to(logits)
    before = float(cross_entropy(logits, labels, weights))
    # The loss is convex in 1 / T, so its slope has one root: halve the interval.
    low, high = 1 / _RANGE, _RANGE
    for _ in range(60):
        middle = (low * high) ** 0.5
        inverse = torch.tensor(middle, dtype=torch.float64, requires_grad=True)
        cross_entropy(logits * inverse, labels, weights).backward()
        assert inverse.grad is not None
        low, high = (middle, high) if inverse.grad < 0 else (low, middle)
    temperature = 1 / (low * high) ** 0.5
    after = float(cross_entropy(logits / temperature, labels, weights))
    return Calibration(temperature, before, after)
