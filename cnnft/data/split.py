"""train and val: as the source separates them, or a stratified split."""

import hashlib
from collections.abc import Collection
from dataclasses import replace

from cnnft.data.dataset import LEAK, Dataset, Samples, Skipped
from cnnft.errors import CnnftError


def train_and_val(
    dataset: Dataset, val_fraction: float, seed: int, val_hashes: Collection[str] | None = None
) -> Dataset:
    """The same with two splits, which a model is trained and selected on; no content is in both.

    Where the source has a val split, its images that are in train too are left out of val (data
    leaks); otherwise part of train is split off: the contents `val_hashes`, where they are known;
    nothing with a `val_fraction` of 0.

    Raises:
        CnnftError: a class has no image in train that can be read, or nothing remains for val.
    """
    skipped = dataset.skipped
    if dataset.val is None and val_hashes is not None:
        train, val = split_by(dataset.train, val_hashes)
    elif dataset.val is None and not val_fraction:
        train, val = dataset.train, dataset.train.take(())
    elif dataset.val is None:
        train, val = split(dataset.train, val_fraction, seed)
    else:
        train = dataset.train
        leaked, val = split_by(dataset.val, frozenset(dataset.val.hashes).difference(train.hashes))
        leaks = (Skipped(path, LEAK) for path in leaked.paths)
        skipped = tuple(sorted((*skipped, *leaks), key=lambda entry: entry.path))
    for name, count in train.counts_by_class().items():
        if count == 0:
            raise CnnftError(
                f"{dataset.source}: class {name} has no image to train on that can be read; cnnft "
                "check lists those that cannot"
            )
    if not len(val) and (val_fraction or dataset.val is not None):
        if dataset.val is None:
            raise CnnftError(
                f"{dataset.source}: no class has two different images, so that none can be held "
                "out for validation: add images, or a val folder"
            )
        raise CnnftError(
            f"{dataset.source}: no readable validation image remains that is not in train too"
        )
    return replace(
        dataset,
        splits={"train": train, "val": val},
        skipped=skipped,
        contradictions=tuple(dataset.samples.contradictions()),
    )


def split(samples: Samples, val_fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Stratified (train, val), a function of file contents, `val_fraction` and `seed` alone.

    Files are ranked by a hash of (seed, content), so names, order and the training seed do not
    matter. Exact duplicates share that hash and stay on one side, also across classes: a content
    counts for the class in which it is first seen.

    A class of which only one content is left has no image in val: it is trained, and has no score.
    """
    home: dict[str, int] = {}
    for digest, label in zip(samples.hashes, samples.labels, strict=True):
        home.setdefault(digest, label)
    contents_of: list[list[str]] = [[] for _ in samples.classes]
    for digest, label in home.items():
        contents_of[label].append(digest)
    val_hashes: set[str] = set()
    for contents in contents_of:
        contents.sort(key=lambda digest: _rank(digest, seed))
        count = min(max(round(val_fraction * len(contents)), 1), len(contents) - 1)
        val_hashes.update(contents[: max(count, 0)])
    val_hashes -= _needed_in_train(samples, val_hashes, seed)
    return split_by(samples, val_hashes)


def split_by(samples: Samples, val_hashes: Collection[str]) -> tuple[Samples, Samples]:
    """(train, val), where the contents of val are known."""
    known = frozenset(val_hashes)
    in_val = [digest in known for digest in samples.hashes]
    return (
        samples.take(i for i, chosen in enumerate(in_val) if not chosen),
        samples.take(i for i, chosen in enumerate(in_val) if chosen),
    )


def _needed_in_train(samples: Samples, val_hashes: set[str], seed: int) -> set[str]:
    """A content of each class whose images are all in other classes too, and chosen for val."""
    contents: list[set[str]] = [set() for _ in samples.classes]
    for digest, label in zip(samples.hashes, samples.labels, strict=True):
        contents[label].add(digest)
    bare = (of for of in contents if of and of <= val_hashes)
    return {min(of, key=lambda digest: _rank(digest, seed)) for of in bare}


def _rank(digest: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()
