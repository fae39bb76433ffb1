"""Temperature scaling: one number that makes probabilities as sure as they are right."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

HIGHEST = 20.0
"""Temperatures are between 1 / 20 and 20."""
_SPREAD = 0.5
"""About the standard deviation of log T before any image is seen: the best of those that were
simulated (research/temperature.py, docs/how-much-to-train.md)."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the mean log-loss."""

    temperature: float
    loss_before: float
    loss: float


def calibrate(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Calibration:
    """The temperature T for which logits / T have the least log-loss (Guo et al., 2017), where
    there are many images; of few, the likeliest T where 1 / T has a
    gamma prior with its mode at 1, which is convex in 1 / T, as the log-loss is.

    `logits` (N, C) of images that the classifier was not fitted on, `labels` (N,). Without
    `class_weights` (C,) every image weighs the same, whatever it weighed in training: probabilities
    are for data as it comes.
    """
    logits = logits.double()
    weights = None if class_weights is None else class_weights.to(logits)
    before = float(cross_entropy(logits, labels, weights))
    strength = 1 / (_SPREAD**2 * len(labels))
    low, high = -math.log(HIGHEST), math.log(HIGHEST)
    for _ in range(60):  # halves the interval in which the slope has its root
        log_t = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        prior = strength * ((-log_t).exp() - 1 + log_t)
        loss = cross_entropy(logits / log_t.exp(), labels, weights) + prior
        loss.backward()
        assert log_t.grad is not None
        low, high = (log_t.item(), high) if log_t.grad < 0 else (low, log_t.item())
    temperature = math.exp((low + high) / 2)
    after = float(cross_entropy(logits / temperature, labels, weights))
    return Calibration(temperature, before, after)
