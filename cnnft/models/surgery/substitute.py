"""A network with other modules in some places; all that is not replaced is shared with it."""

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def substituted(network: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """`network` with each of `modules` at its path; only what holds one of them is copied."""
    if "" in modules:
        return modules[""]
    clone = copy.copy(network)
    clone._modules = dict(network._modules)
    for name in {path.partition(".")[0] for path in modules}:
        below = {path.partition(".")[2]: m for path, m in modules.items() if _is_at(path, name)}
        clone._modules[name] = substituted(network.get_submodule(name), below)
    return clone


class Substituted(nn.Module):
    """The same for a network that trains: what is copied is in train mode where the original is."""

    def __init__(self, network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = substituted(network, modules)
        self._copies = [
            (self.network.get_submodule(path), network.get_submodule(path))
            for path in {above for path in modules for above in _above(path)}
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        for clone, original in self._copies:  # some drop features in their own forward
            clone.training = self.training and original.training
        outputs: Tensor = self.network(inputs)
        return outputs


def _is_at(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _above(path: str) -> Iterator[str]:
    """Paths of all that holds the module, the network itself ("") included."""
    while path:
        path = path.rpartition(".")[0]
        yield path
