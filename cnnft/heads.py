"""Which tensors are the head: whatever changes with the number of classes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def head_tensors(network: nn.Module, rebuild: Callable[[int], nn.Module]) -> frozenset[str]:
    """Names of the head's tensors in `network.state_dict()`.

    `rebuild(classes)` makes the same network for another number of classes; the head is what comes
    out in another shape. This asks no network which architecture it is.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    classes = max(shape[0] for shape in shapes.values() if shape)  # differs from the present number
    try:
        with torch.device("meta"):  # costs no memory
            other = rebuild(classes + 1).state_dict()
    except RuntimeError:  # torchvision's RegNets compute their widths with tensors
        other = rebuild(classes + 1).state_dict()
    return frozenset(
        name for name in shapes if name not in other or other[name].shape != shapes[name]
    )


def without_head(state: dict[str, Tensor], head: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in head}
