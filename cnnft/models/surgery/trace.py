"""Tracing with forward hooks: which modules compute when, seen on an example."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

EXAMPLES = 2
_TOLERANCE = 1e-4
_SIDE = 64
"""Pixels of a small example."""


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass."""

    path: str
    entered: Tensor
    """Its first input."""
    output: object


def example(network: nn.Module, size: int) -> Tensor:
    """(EXAMPLES, 3, size, size), always the same: on it a network with other modules shows whether
    it still computes the same.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(EXAMPLES, 3, size, size, generator=generator)
    return pixels.to(next(network.parameters()).device)


def small_first(size: int, look: Callable[[int], T]) -> T:
    """What `look` finds with images of 64 × 64 pixels, or of size × size where those are too small.

    For what is alike at any size: whoever predicts a single image is not to wait longer for it than
    for the image.
    """
    if size > _SIDE:
        with suppress(Exception):  # whatever a network says that is built for one size
            return look(_SIDE)
    return look(size)


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
