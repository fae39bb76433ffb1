"""What enters a network's classifier: its features, or pre-logits, of each image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnnft.models.heads import classifier_layer
from cnnft.models.surgery.cut import Cut, find_cut_before
from cnnft.models.surgery.trace import example

_TOLERANCE = 1e-4

Embed = Callable[[nn.Module, Tensor], Tensor]
"""(network, pixels (B, 3, H, W)) -> features (B, D); gradients flow."""


def find_embedding(network: nn.Module, head: frozenset[str], size: int) -> Embed:
    """How a network with this head is asked for its features of images of size × size pixels.

    timm's networks say it themselves (`forward_head(pre_logits=True)`); of others the place before
    the head is found on an example. Maps and tokens are averaged. The network is left in eval mode,
    its parameters as they were.
    """
    network.eval()
    with torch.inference_mode():
        if _says_itself(network, head, size):
            return _pre_logits
    parameters = {name for name, _ in network.named_parameters() if name in head}
    cut = find_cut_before(network, size, parameters) or before_some_head(head)
    return lambda network, pixels: pooled(cut.activations(network, pixels))


def before_some_head(head: frozenset[str]) -> Cut:
    """One of several heads on different features, which distilled networks have."""
    layers = {name.rpartition(".")[0] for name in head}
    return Cut(min(path for path in layers if "aux" not in path.lower()), frozenset())


def pooled(features: Tensor) -> Tensor:
    """Maps (B, D, H, W) and tokens (B, N, D) averaged: (B, D)."""
    if features.ndim <= 2:
        return features
    return features.mean(dim=(2, 3) if features.ndim == 4 else 1)


def _pre_logits(network: Any, pixels: Tensor) -> Tensor:
    features: Tensor = network.forward_head(network.forward_features(pixels), pre_logits=True)
    return features


def _says_itself(network: nn.Module, head: frozenset[str], size: int) -> bool:
    """Whether timm's pre-logits are what the classifier layer makes logits of."""
    if not hasattr(network, "forward_head"):
        return False
    pixels = example(network, size)
    try:
        features = _pre_logits(network, pixels)
    except TypeError:  # some networks take no pre_logits
        return False
    layer = classifier_layer(network, head)[1]
    if features.ndim != 2 or not isinstance(layer, nn.Linear):
        return False
    if layer.in_features != features.shape[1]:
        return False
    logits = network(pixels)
    return torch.allclose(layer(features), logits, rtol=_TOLERANCE, atol=_TOLERANCE)
