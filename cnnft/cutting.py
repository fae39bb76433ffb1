"""Where a network can be cut: what is frozen comes before, what trains comes after.

Nothing asks which architecture it is: what computes when is seen on an example, and a cut that
changes the example's logits is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from cnnft.freezing import train_mode
from cnnft.substitution import Substituted, example

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cut:
    """A place where activations can be kept: they are a function of the image alone."""

    first: str
    """Path of the first module after it; the activations are what enters that."""
    passed: frozenset[str]
    """Paths of the modules before it; empty where `first` is all that comes after it."""

    def tail(self, network: nn.Module) -> nn.Module:
        """Activations (B, ...) -> logits (B, C), by the network's own modules."""
        if not self.passed:
            return network.get_submodule(self.first)
        return Substituted(network, {path: nn.Identity() for path in self.passed})

    def activations(self, network: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> what enters `first`; the rest is not computed."""

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        # The first of its hooks: dropout on what enters a head comes after the cut.
        hook = network.get_submodule(self.first).register_forward_pre_hook(stop, prepend=True)
        try:
            network(pixels)
        except _Reached as reached:
            return reached.activations
        finally:
            hook.remove()
        raise AssertionError(f"{self.first} was not reached")


class _Reached(Exception):  # noqa: N818  # nothing is wrong
    def __init__(self, activations: Tensor) -> None:
        self.activations = activations


def find_cut(network: nn.Module, size: int, *, evaluating: bool = False) -> Cut | None:
    """The last place before everything that trains; None where the network has no such place.

    Images have size × size pixels. `evaluating`: what changes activations in training alone, such
    as dropout, may come before it. The network is left in eval mode.
    """
    pixels = example(network, size)
    train_mode(network)
    varying = [] if evaluating else [m for m in network.modules() if m.training and _varies(m)]
    network.eval()
    with torch.inference_mode():
        for opened in (True, False):
            cut = _find(network, pixels, dict(_units(network, opened)), set(varying))
            if cut is not None:
                return cut
    return None


def _find(
    network: nn.Module, pixels: Tensor, units: dict[str, nn.Module], changing: set[nn.Module]
) -> Cut | None:
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        for path, module in units.items()
    ]
    try:
        expected = network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    after = [path for path in called if _trains(units[path]) or _holds(units[path], changing)]
    if not after or not isinstance(expected, Tensor):
        return None
    if not expected.any():  # a head of zeros, behind which every cut looks right
        return None
    first = after[0]
    passed = frozenset(called[: called.index(first)])
    once = len(set(called)) == len(called)  # else what was passed may be called again
    for cut in (Cut(first, frozenset()), *([Cut(first, passed)] if once else [])):
        try:
            found = cut.tail(network)(cut.activations(network, pixels))
        except Exception:  # it does something else in between, which this cannot leave out
            continue
        same = isinstance(found, Tensor) and found.shape == expected.shape
        if passed and same and torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return cut
    return None


def _varies(module: nn.Module) -> bool:
    """Whether its output, in train mode, is not a function of the image alone."""
    if isinstance(module, _DropoutNd | StochasticDepth):
        return module.p > 0
    if isinstance(module, DropPath):
        return module.drop_prob > 0
    return isinstance(module, _BatchNorm)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _holds(module: nn.Module, some: set[nn.Module]) -> bool:
    return any(inner in some for inner in module.modules())


def _units(module: nn.Module, opened: bool, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that train as a whole or not at all, with their paths.

    `opened`: of what trains, the smallest, so that pooling in a head comes before the cut.
    """
    for name, child in module.named_children():
        states = {parameter.requires_grad for parameter in child.parameters()}
        if any(child.children()) and (len(states) > 1 or (opened and True in states)):
            yield from _units(child, opened, f"{prefix}{name}.")
        else:
            yield prefix + name, child
