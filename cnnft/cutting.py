"""Where a network can be cut: what is frozen comes before, what trains comes after.

Nothing asks which architecture it is: what computes when is seen on an example, and a cut that
changes the example's logits is none.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cut:
    """A place where activations can be kept: they are a function of the image alone."""

    first: str
    """Path of the first module that trains; the activations are what enters it."""
    passed: frozenset[str]
    """Paths of the modules before it, which do nothing to its activations."""

    def tail(self, network: nn.Module) -> nn.Module:
        """Activations (B, ...) -> logits (B, C), with the network's own trained modules."""
        if not self.passed:
            return network.get_submodule(self.first)
        return _without(network, self.passed)

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


def find_cut(network: nn.Module, pixels: Tensor) -> Cut | None:
    """The last place before everything that trains; None where the network has no such place.

    `pixels` (B, 3, H, W) are an example, B at least 2.
    """
    before = [module.training for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode():
            return _find(network, pixels)
    finally:
        for module, training in zip(network.modules(), before, strict=True):
            module.training = training


def _find(network: nn.Module, pixels: Tensor) -> Cut | None:
    units = dict(_units(network))
    called: list[str] = []

    def note(path: str) -> None:
        called.append(path)

    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: note(path))
        for path, module in units.items()
    ]
    try:
        expected = network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    trained = [path for path in called if _trains(units[path])]
    if not trained or not isinstance(expected, Tensor):
        return None
    first = trained[0]
    passed = frozenset(called[: called.index(first)])
    if not passed or len(set(called)) < len(called):  # something is used again after the cut
        return None
    for cut in (Cut(first, frozenset()), Cut(first, passed)):
        try:
            found = cut.tail(network)(cut.activations(network, pixels))
        except Exception:  # it does something else in between, which this cannot leave out
            continue
        if isinstance(found, Tensor) and found.shape == expected.shape:
            if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return cut
    return None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that train as a whole or not at all, with their paths."""
    for name, child in module.named_children():
        states = {parameter.requires_grad for parameter in child.parameters()}
        if len(states) > 1 and any(child.children()):
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _without(module: nn.Module, gone: frozenset[str], prefix: str = "") -> nn.Module:
    """The module with others in place of those `gone`; all parameters are shared."""
    if not any(path.startswith(prefix) for path in gone):
        return module
    clone = copy.copy(module)
    clone._modules = {
        name: nn.Identity()
        if prefix + name in gone
        else child and _without(child, gone, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return clone
