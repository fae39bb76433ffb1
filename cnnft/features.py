"""Frozen features, and what a linear classifier makes of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import distributed
from cnnft.batches import Views, keyed_seed
from cnnft.heads import classifier_layer
from cnnft.inference import infer_all

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties on standardised features, among which cross-validation chooses."""
FOLDS = 5
_MOST = 5000  # images that cross-validation looks at
_MOST_FITTED = 50_000
_LEAST_SPREAD = 0.01  # of the median feature's
_CHECKED = 256  # images on which the classifier is compared with the network


@dataclass(frozen=True)
class Features:
    """What enters the classifier, for each image."""

    values: Tensor
    """(N, D), averaged over space where the classifier sees a map."""
    linear: bool
    """Whether the logits are a linear function of `values`, so that a probe can be the head."""


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on frozen features: logits = values @ weight.T + bias."""

    weight: Tensor
    bias: Tensor
    accuracy: float
    """In cross-validation over the training images."""
    strength: float


def embed(
    network: nn.Module, head: frozenset[str], batches: Iterable[Views], paths: Sequence[str | Path]
) -> Features:
    """Run all `paths` through the network once, in their order."""
    layers = {name.rpartition(".")[0] for name in head}
    entering: list[Tensor] = []
    order: list[nn.Module] = []  # of the head, as it computes: auxiliary classifiers do not

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module not in order:
            order.append(module)
        if module is order[0]:
            entering.append(inputs[0].detach().float().cpu())

    handles = [network.get_submodule(path).register_forward_pre_hook(keep) for path in layers]
    try:
        log_probs = infer_all(network, batches, paths)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.cat(distributed.gather(entering))
    linear = distributed.by_main(lambda: _are_linear(order, values, log_probs))
    if values.ndim > 2:
        values = values.flatten(2).mean(dim=2) if values.ndim == 4 else values.mean(dim=1)
        linear = False
    return Features(values, linear)


def _are_linear(order: list[nn.Module], values: Tensor, log_probs: Tensor) -> bool:
    """Whether the head is one linear layer, and nothing follows it."""
    layer = order[0]
    if not isinstance(layer, nn.Linear) or layer.bias is None or len(order) > 1 or values.ndim > 2:
        return False
    with torch.no_grad():
        logits = layer(values[:_CHECKED].to(layer.weight.device)).float().cpu()
    return torch.allclose(logits.log_softmax(dim=1), log_probs[:_CHECKED], atol=1e-3)


def probe(values: Tensor, labels: Tensor, classes: int, seed: int) -> Probe:
    """Choose the penalty by cross-validation, then fit all images with it."""
    picked = _some(len(values), seed, _MOST)
    scores = {s: _cross_validate(values[picked], labels[picked], classes, s) for s in STRENGTHS}
    strength = max(STRENGTHS, key=lambda s: (scores[s], s))
    fitted = _some(len(values), seed, _MOST_FITTED)
    weight, bias = fit(values[fitted], labels[fitted], classes, strength)
    return Probe(weight, bias, scores[strength], strength)


def install(network: nn.Module, head: frozenset[str], fitted: Probe) -> None:
    """Make the probe the network's head."""
    _, layer = classifier_layer(network, head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(fitted.weight)
        layer.bias.copy_(fitted.bias)


def fit(values: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) that minimise mean cross-entropy + strength / 2 · ‖weight‖².

    The penalty is on the weights of standardised features; L-BFGS (Liu and Nocedal, 1989) in
    double precision.
    """
    x = values.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    # A feature that hardly varies in training must not decide: it may be large elsewhere.
    std = std.clamp(min=max(_LEAST_SPREAD * float(std.median()), 1e-8))
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = strength / 2 * weight.square().sum()
        loss: Tensor = cross_entropy(x @ weight.T + bias, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        original = weight / std
        return original.float(), (bias - original @ mean).float()


def _cross_validate(values: Tensor, labels: Tensor, classes: int, strength: float) -> float:
    """Accuracy over folds that each hold their share of every class."""
    order = torch.argsort(labels, stable=True)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % min(FOLDS, len(order))
    correct = 0
    for held_out in fold.unique():
        inside = fold != held_out
        weight, bias = fit(values[inside], labels[inside], classes, strength)
        predicted = (values[~inside] @ weight.T + bias).argmax(dim=1)
        correct += int((predicted == labels[~inside]).sum())
    return correct / len(labels)


def _some(n: int, seed: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(keyed_seed("probe", seed))
    return torch.randperm(n, generator=generator)[:most]
