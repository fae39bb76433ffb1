"""Where a network can be cut into a feature extractor, which is frozen, and what trains after it.

Nothing asks which architecture it is: what computes when is seen on an example, and a cut that
changes the example's logits is none.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from cnnft.models.freezing import train_mode
from cnnft.models.surgery.substitute import Substituted
from cnnft.models.surgery.trace import example, same_output, trace


@dataclass(frozen=True)
class Cut:
    """A place where activations can be kept: they are a function of the image alone."""

    first: str
    """Path of the first module after it; the activations are what enters that."""
    before: frozenset[str]
    """Paths of the modules before it; empty where `first` is all that comes after it."""

    def tail(self, network: nn.Module) -> nn.Module:
        """Features (B, ...) -> logits (B, C), by the network's own modules."""
        if not self.before:
            return network.get_submodule(self.first)
        return Substituted(network, {path: nn.Identity() for path in self.before})

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


def find_cut(network: nn.Module, size: int) -> Cut | None:
    """The last place before everything that trains; None where the network has no such place.

    Images have size × size pixels. The network is left in eval mode.
    """
    train_mode(network)
    varying = {m for m in network.modules() if m.training and _varies(m)}
    after = {name for name, p in network.named_parameters() if p.requires_grad}
    pixels = example(network, size)
    network.eval()
    with torch.inference_mode():
        for opened in (True, False):
            units = dict(_units(network, after, opened))
            last = {p for p, m in units.items() if _owns(p, after) or varying & {*m.modules()}}
            if cut := _try_cuts(network, pixels, units, last):
                return cut
    return None


def _try_cuts(
    network: nn.Module, pixels: Tensor, units: dict[str, nn.Module], last: set[str]
) -> Cut | None:
    """The place before the first of the units `last`, if what follows gives the same logits."""
    calls, expected = trace(network, pixels, units)
    called = [call.path for call in calls]
    first = next((path for path in called if path in last), None)
    if first is None or first == called[0] or not isinstance(expected, Tensor):
        return None
    if not expected.any():  # a head of zeros, behind which every cut looks right
        return None
    before = frozenset(called[: called.index(first)])
    once = len(set(called)) == len(called)  # else what comes before may be called again
    for cut in (Cut(first, frozenset()), *([Cut(first, before)] if once else [])):
        try:
            # In another order: what a module has kept of its last images would not go unnoticed.
            found = cut.tail(network)(cut.activations(network, pixels).flip(0)).flip(0)
        except Exception:  # it does something else in between, which this cannot leave out
            continue
        if same_output(found, expected):
            return cut
    return None


def _varies(module: nn.Module) -> bool:
    """Whether its output, in train mode, is not a function of the image alone."""
    if isinstance(module, _DropoutNd | StochasticDepth):
        return module.p > 0
    if isinstance(module, DropPath):
        return module.drop_prob > 0
    return isinstance(module, _BatchNorm)


def _owns(path: str, names: Collection[str]) -> bool:
    """Whether one of the parameters `names` lies in the module at `path`."""
    return any(name.startswith(f"{path}.") for name in names)


def _units(
    module: nn.Module, after: set[str], opened: bool, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules of which all parameters are in `after`, or none; with their paths.

    `opened`: of those that are, the smallest, so that pooling in a head comes before the cut.
    """
    for name, child in module.named_children():
        path = prefix + name
        states = {f"{path}.{inner}" in after for inner, _ in child.named_parameters()}
        if any(child.children()) and (len(states) > 1 or (opened and True in states)):
            yield from _units(child, after, opened, f"{path}.")
        else:
            yield path, child
