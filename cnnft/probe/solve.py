"""Multinomial logistic regression on features: the solver and its cross-validation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cnnft.data.sampler import keyed_seed

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties on standardised features, among which cross-validation chooses."""
FOLDS = 5
_MOST = 5000  # images that cross-validation looks at
_MOST_FITTED = 50_000
_LEAST_SPREAD = 0.01
"""Of the root mean square of the features' standard deviations: a feature that hardly varies in
training must not decide, because it may be large elsewhere. (The median would be 0 where most are
dead, as ReLU features of few images are.)"""


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on frozen features: logits = values @ weight.T + bias."""

    weight: Tensor
    bias: Tensor
    accuracy: float
    """In cross-validation over the training images."""
    strength: float


def fit_probe(
    values: Tensor, labels: Tensor, classes: int, seed: int, class_weights: Tensor | None = None
) -> Probe:
    """Choose the penalty by cross-validated accuracy, then fit all images with it.

    `values` (N, D), `labels` (N,), `class_weights` (C,) of the loss.
    """
    picked = _some(len(values), seed, _MOST)
    some = values[picked], labels[picked], classes
    scores = {s: _cross_validate(*some, s, class_weights) for s in STRENGTHS}
    strength = max(STRENGTHS, key=lambda s: (scores[s], s))
    fitted = _some(len(values), seed, _MOST_FITTED)
    weight, bias = fit(values[fitted], labels[fitted], classes, strength, class_weights)
    return Probe(weight, bias, scores[strength], strength)


def fit(
    values: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) that minimise mean cross-entropy + strength / 2 · ‖weight‖².

    With `class_weights` each image's cross-entropy is weighted by its class.

    The penalty is on the weights of standardised features; L-BFGS (Liu and Nocedal, 1989) in
    double precision.
    """
    x = values.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = std.clamp(min=max(_LEAST_SPREAD * float(std.square().mean().sqrt()), 1e-8))
    x = (x - mean) / std
    by_class = None if class_weights is None else class_weights.to(x)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = strength / 2 * weight.square().sum()
        losses = cross_entropy(x @ weight.T + bias, labels, by_class, reduction="sum")
        loss: Tensor = losses / len(labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        original = weight / std
        return original.float(), (bias - original @ mean).float()


def _cross_validate(
    values: Tensor, labels: Tensor, classes: int, strength: float, class_weights: Tensor | None
) -> float:
    """Accuracy over folds that each hold their share of every class."""
    order = torch.argsort(labels, stable=True)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % min(FOLDS, len(order))
    correct = 0
    for held_out in fold.unique():
        inside = fold != held_out
        weight, bias = fit(values[inside], labels[inside], classes, strength, class_weights)
        predicted = (values[~inside] @ weight.T + bias).argmax(dim=1)
        correct += int((predicted == labels[~inside]).sum())
    return correct / len(labels)


def _some(n: int, seed: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(keyed_seed("probe", seed))
    return torch.randperm(n, generator=generator)[:most]
