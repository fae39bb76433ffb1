"""Folds of cross-validation: every class spread over all of them, what belongs together in one."""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from cnnft.data.dataset import Samples
from cnnft.data.sampler import keyed_seed

FOLDS = 5


def assign_folds(samples: Samples, folds: int) -> Tensor:
    """(N,): the fold of each image, 0 … folds - 1.

    Copies of one content, and images of one group, are in the same fold. The largest of these
    units are placed first, each where it leaves its classes most evenly spread. It depends on the
    contents alone, not on the order of the files or on a seed.
    """
    units = _units(samples)
    totals = samples.counts()
    filled = [[0] * len(totals) for _ in range(folds)]
    sizes = [0] * folds
    found = torch.empty(len(samples), dtype=torch.long)
    for name in sorted(units, key=lambda name: (-len(units[name]), keyed_seed("fold", name))):
        counts = Counter(samples.labels[row] for row in units[name])
        shares = [sum(n * of[c] / totals[c] for c, n in counts.items()) for of in filled]
        fold = min(range(folds), key=lambda fold: (shares[fold], sizes[fold]))
        for label, n in counts.items():
            filled[fold][label] += n
        sizes[fold] += len(units[name])
        found[units[name]] = fold
    return found


def _units(samples: Samples) -> dict[str, list[int]]:
    """Rows that belong together, by the name of one of them."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.get(name, name) != name:
            name = above[name]
        return name

    for digest, group in zip(samples.hashes, samples.groups, strict=False):
        one, other = top(digest), top(f"group {group}")
        above[max(one, other)] = min(one, other)
    units: defaultdict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(samples.hashes):
        units[top(digest)].append(row)
    return units
