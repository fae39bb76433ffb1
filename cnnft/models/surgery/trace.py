"""Tracing with forward hooks: which modules compute when, seen on an example."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass."""

    path: str
    entered: Tensor
    """Its first input."""
    output: object


def example(network: nn.Module, size: int) -> Tensor:
    """(2, 3, size, size), always the same: on it a network with other modules shows whether it
    still computes the same.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    return pixels.to(next(network.parameters()).device)


def same_output(found: object, expected: object) -> bool:
    """Whether two outputs for the same example are equal but for rounding."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return False
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def trace(
    network: nn.Module, pixels: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[list[Call], object]:
    """(calls of `modules`, by path, in the order in which they return; the network's output)."""
    calls: list[Call] = []

    def note(path: str, inputs: tuple[Tensor, ...], output: object) -> None:
        if inputs:  # else all are keyword arguments, which hooks do not see
            calls.append(Call(path, inputs[0], output))

    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, path=path: note(path, inputs, output)
        )
        for path, module in modules.items()
    ]
    try:
        return calls, network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
