"""What enters a network's head: its features (timm: pre-logits) of each image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnft.errors import CnnftError
from cnnft.models.freezing import evaluating
from cnnft.models.surgery.cut import Cut
from cnnft.models.surgery.trace import example, same_output, trace

Embed = Callable[[nn.Module, Tensor], Tensor]
"""(network, pixels (B, 3, H, W)) -> features (B, D); gradients flow."""


@dataclass(frozen=True)
class HeadPlace:
    """Where features enter the head, as an example showed."""

    paths: tuple[str, ...]
    """Of the modules that make logits of features: one, or several, whose logits the network
    averages."""
    linear: bool
    """Whether the logits are one linear layer, with a bias, of the features."""

    @property
    def cut(self) -> Cut:
        """Right before the head; of several the first."""
        return Cut(self.paths[0], frozenset())


def find_head(network: nn.Module, head: frozenset[str], size: int) -> HeadPlace | None:
    """None where no module makes logits of features of images of size × size pixels."""
    found = _trace_head(network, head, example(network, size))
    return None if found is None else found[0]


def find_embedding(network: nn.Module, head: frozenset[str], size: int) -> Embed:
    """How a network with this head is asked for its features of images of size × size pixels.

    timm's networks say it themselves (`forward_head(pre_logits=True)`), which is believed where an
    example agrees; of others they are taken where they enter the head. Maps and tokens are averaged
    over their positions. Of several heads, where timm says so, they are the mean of what enters
    each (class and distillation token), or concatenated where their widths differ (CrossViT); else
    what enters the first.

    Weights, buffers, `requires_grad` and train or eval mode stay as they are.

    Raises:
        CnnftError: no module makes logits of features.
    """
    pixels = example(network, size)
    found = _trace_head(network, head, pixels)
    if found is None:
        raise CnnftError("this network has no module that makes logits of features")
    place, entered = found
    if _timm_agrees(network, pixels, entered):
        return _pre_logits
    return lambda network, pixels: pooled(place.cut.activations(network, pixels))


def pooled(features: Tensor) -> Tensor:
    """Maps (B, D, H, W), tokens (B, N, D) and square maps (B, H, W, D) averaged: (B, D)."""
    if features.ndim <= 2:
        return features
    if features.ndim == 3:
        return features.mean(dim=1)
    channels_last = features.shape[1] == features.shape[2] != features.shape[3]
    return features.mean(dim=(1, 2) if channels_last else (2, 3))


@torch.no_grad()  # inference_mode would stay in what some networks cache of their weights
def _trace_head(
    network: nn.Module, head: frozenset[str], pixels: Tensor
) -> tuple[HeadPlace, Tensor] | None:
    """The place, and what entered there, (B, D)."""
    with evaluating(network):
        modules = _head_modules(network, head)
        calls, logits = trace(network, pixels, modules)
        calls = [call for call in calls if _is_logits(call.output, logits)]
        if not calls:
            return None
        entered = _joined([pooled(call.entered) for call in calls])
        layer = modules[calls[0].path]
        linear = isinstance(layer, nn.Linear) and layer.bias is not None and len(calls) == 1
        same = linear and same_output(calls[0].output, logits)
    return HeadPlace(tuple(call.path for call in calls), same), entered


def _joined(features: list[Tensor]) -> Tensor:
    """Of several heads, as timm joins them: the mean, or side by side where widths differ."""
    if len({one.shape for one in features}) > 1:
        return torch.cat(features, dim=1)
    return torch.stack(features).mean(dim=0)


def _head_modules(network: nn.Module, head: frozenset[str]) -> dict[str, nn.Module]:
    """By path: modules of which all tensors are the head's, and which are not just wrapped."""
    found: dict[str, nn.Module] = {}

    def search(module: nn.Module, path: str) -> None:
        names = {f"{path}.{name}" for name in module.state_dict()}
        if not names or names.isdisjoint(head) or "aux" in path.lower():
            return
        holding = [(n, child) for n, child in module.named_children() if child.state_dict()]
        if names <= head and len(holding) != 1 and not isinstance(module, nn.ModuleList):
            found[path] = module
        else:
            for name, child in holding:
                search(child, f"{path}.{name}")

    for name, child in network.named_children():
        search(child, name)
    return found


def _is_logits(output: object, logits: object) -> bool:
    """Whether it has a value for each class, of each image or of each place in it."""
    if not isinstance(output, Tensor) or not isinstance(logits, Tensor):
        return False
    return output.ndim >= 2 and output.shape[:2] == logits.shape[:2]


def _timm_agrees(network: Any, pixels: Tensor, entered: Tensor) -> bool:
    """Whether timm's pre-logits are what enters the head."""
    if not hasattr(network, "forward_features") or not hasattr(network, "forward_head"):
        return False
    try:
        with torch.no_grad(), evaluating(network):
            return same_output(_pre_logits(network, pixels), entered)
    except TypeError:  # some networks take no pre_logits
        return False


def _pre_logits(network: Any, pixels: Tensor) -> Tensor:
    features: Tensor = network.forward_head(network.forward_features(pixels), pre_logits=True)
    return pooled(features)
