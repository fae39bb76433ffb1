"""The backbone's stages: ordered groups of layers, input side first. Freezing counts in them."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from timm.models import group_parameters
from torch import nn

_FEWEST = 4
_LARGEST = 0.8  # share of the parameters that one stage may hold before it is divided


def stages(network: nn.Module, head: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """Names of the backbone's parameters by stage; every one of them is in exactly one.

    timm's networks say themselves how their layers group; of the others the module tree tells.
    """
    backbone = {name: p for name, p in network.named_parameters() if name not in head}
    # Normalisations, class tokens, position embeddings: no stage of their own.
    small = {name for name, p in backbone.items() if p.ndim < 2 or p.shape[0] == 1}
    try:
        matcher: Any = network.group_matcher
        groups = group_parameters(network, matcher(coarse=True)).values()
        named = [[name for name in group if name in backbone] for group in groups]
        found = _join([group for group in named if group], small)
    except (AttributeError, AssertionError, NotImplementedError):  # it does not group its layers
        found = []
    if len(found) < 2:  # LevIT's groups are those of another network, before timm 1.0.31
        found = _by_tree({name: p.numel() for name, p in backbone.items()}, small)
    return tuple(tuple(group) for group in found)


def _by_tree(sizes: dict[str, int], small: set[str]) -> list[list[str]]:
    """Group by module: containers are opened until there are some stages, none of them huge."""
    found = _join(_open(sizes, depth=1), small)
    for depth in range(2, 9):
        if len(found) < _FEWEST:
            opened = [part for group in found for part in _open(group, depth)]
        else:
            whole = sum(sizes.values())
            largest = max(found, key=lambda group: sum(sizes[name] for name in group))
            if sum(sizes[name] for name in largest) <= _LARGEST * whole:
                break
            opened = [
                part
                for group in found
                for part in (_open(group, depth) if group is largest else [group])
            ]
        found = _join(opened, small)
    return found


def _open(group: Iterable[str], depth: int) -> list[list[str]]:
    return [list(part) for _, part in groupby(group, key=lambda name: name.split(".")[:-1][:depth])]


def _join(groups: list[list[str]], small: set[str]) -> list[list[str]]:
    found: list[list[str]] = []
    for group in groups:
        if found and (small.issuperset(group) or small.issuperset(found[-1])):
            found[-1] = found[-1] + group
        else:
            found.append(group)
    return found
