"""Logits divided by a number, in the weights: by a temperature, for programs that know none."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from cnnft.models.freezing import evaluating
from cnnft.models.surgery.trace import example, same_output


def divided(network: nn.Module, head: frozenset[str], number: float, size: int) -> nn.Module | None:
    """A copy whose logits are `number` times smaller; None where no layer's weights say so.

    `head`: names of its tensors. Images have size × size pixels. The last linear or convolutional
    layer of the head has its weight and bias divided; where that is not enough, because a network
    averages several heads, each of them. Which it is shows on an example.
    """
    paths = list(dict.fromkeys(n.rpartition(".")[0] for n in network.state_dict() if n in head))
    layers = [p for p in paths if isinstance(network.get_submodule(p), nn.Linear | nn.Conv2d)]
    pixels = example(network, size)
    with torch.no_grad(), evaluating(network):
        wanted = network(pixels) / number
    for chosen in (layers[-1:], layers):
        found = _divide(network, chosen, number)
        with torch.no_grad(), evaluating(found):
            if same_output(found(pixels), wanted):
                return found
    return None


def _divide(network: nn.Module, paths: Sequence[str], number: float) -> nn.Module:
    network = copy.deepcopy(network)
    for path in paths:
        for parameter in network.get_submodule(path).parameters():
            parameter.data /= number
    return network
