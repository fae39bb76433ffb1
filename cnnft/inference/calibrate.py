"""Temperature scaling: one number that makes probabilities as sure as they are right."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

HIGHEST = 20.0
"""Temperatures are between 1 / 20 and 20."""
_SPREAD = 0.5
"""Standard deviation of log T before any image is seen. Simulated with true temperatures of 0.7 to
2.5, 20 images cost 0.022 nats more than the true temperature with it, 0.059 without, and 0.106 not
to calibrate; 0.25 and 1 are worse, and from 100 images on there is no difference."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the mean log-loss."""

    temperature: float
    loss_before: float
    loss: float


def calibrate(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Calibration:
    """The temperature T for which logits / T have the least log-loss (Guo et al., 2017), where
    there are many images; of few, the likeliest T of a log-normal prior around 1.

    `logits` (N, C) of images that the classifier was not fitted on, `labels` (N,). Without
    `class_weights` (C,) every image weighs the same, whatever it weighed in training: probabilities
    are for data as it comes.
    """
    logits = logits.double()
    weights = None if class_weights is None else class_weights.to(logits)
    before = float(cross_entropy(logits, labels, weights))
    strength = 1 / (2 * _SPREAD**2 * len(labels))
    low, high = -math.log(HIGHEST), math.log(HIGHEST)
    for _ in range(60):  # halves the interval in which the slope has its root
        log_t = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        loss = cross_entropy(logits / log_t.exp(), labels, weights) + strength * log_t.square()
        loss.backward()
        assert log_t.grad is not None
        low, high = (log_t.item(), high) if log_t.grad < 0 else (low, log_t.item())
    temperature = math.exp((low + high) / 2)
    after = float(cross_entropy(logits / temperature, labels, weights))
    return Calibration(temperature, before, after)
