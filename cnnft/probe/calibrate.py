"""Temperature scaling: one number that makes probabilities as sure as they are right."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cnnft.metrics import TEMPERATURES

PRIOR = 4.0
"""Of a classifier's temperature: log T has a standard deviation of 1/2 around 0. What it is worth
for 20 to 200 images is in docs/calibration.md."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the mean log-loss."""

    temperature: float
    loss_before: float
    loss: float


def calibrate(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, prior: float = 0.0
) -> Calibration:
    """The temperature T for which logits / T have the least log-loss (Guo et al., 2017), within
    `TEMPERATURES`.

    `logits` (N, C) of images that the classifier was not fitted on, `labels` (N,). Without
    `class_weights` (C,) every image weighs the same, whatever it weighed in training: probabilities
    are for data as it comes. `prior`: that T is about 1 counts as much as the log-loss of some
    images; prior · (1/T - 1 + log T) is added to the sum of theirs, which is about
    prior / 2 · (log T)² and convex in 1 / T (1 / T has a gamma distribution with its mode at 1).
    """
    logits = logits.double()
    weights = None if class_weights is None else class_weights.to(logits)
    before = float(cross_entropy(logits, labels, weights))
    # The loss is convex in 1 / T, so its slope has one root: halve the interval.
    low, high = (1 / bound for bound in reversed(TEMPERATURES))
    for _ in range(60):
        middle = (low * high) ** 0.5
        inverse = torch.tensor(middle, dtype=torch.float64, requires_grad=True)
        cross_entropy(logits * inverse, labels, weights).backward()
        assert inverse.grad is not None
        slope = float(inverse.grad) + prior / len(labels) * (1 - 1 / middle)
        low, high = (middle, high) if slope < 0 else (low, middle)
    least, greatest = TEMPERATURES
    temperature = min(max(1 / (low * high) ** 0.5, least), greatest)  # but for rounding it is
    after = float(cross_entropy(logits / temperature, labels, weights))
    return Calibration(temperature, before, after)
