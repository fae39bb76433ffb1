"""`Dataset` and its `Samples`: labelled images, and what was left out."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

SplitName = Literal["train", "val", "test"]

_COLUMNS = ("paths", "labels", "hashes", "groups", "weights")
"""Of `Samples`: a value for each image, or none at all."""


HIDDEN = "hidden, or left by the system"
OWN = "cnnft's own"
LINK = "a link to a folder that is read at its own place"
EMPTY = "no images"
FOREIGN = "only images in formats that cnnft does not read, to be converted"
PACKED = "only archives, to be unpacked"
UNLABELLED = "unlabelled: no class folders in it"
BESIDE_CLASSES = "beside the class folders"
BESIDE_SPLITS = "beside the split folders"
NO_SPLIT = "no split folder in it"
UNKNOWN = "no class of the training data"
LEAK = "in val: the same file is in train"
BY_PLACE = frozenset(
    {HIDDEN, OWN, LINK, EMPTY, FOREIGN, PACKED, UNLABELLED, BESIDE_CLASSES, BESIDE_SPLITS}
    | {NO_SPLIT, UNKNOWN, LEAK}
)
UNSUITED = "has no image suffix"
"""Reasons of `Skipped`; of an image that cannot be read it is what `ImageError` says."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is left out, and why: a file, files of one kind, or a whole folder."""

    path: str
    """Of a folder it ends with a slash; of several files it is a pattern, the folder and *."""
    reason: str
    files: int = 1
    """Links that are not followed are counted as files; of runs only images are."""
    images: int = 1
    """Those of them that have an image's suffix."""

    @property
    def is_folder(self) -> bool:
        return self.path.endswith(os.sep)

    @property
    def suffix(self) -> str | None:
        """For which it is not opened, such as ".txt"; "" where suffixes are not told apart; None
        where another reason is given."""
        if not self.reason.startswith(UNSUITED):
            return None
        return self.reason.removeprefix(UNSUITED).strip(" ()")

    @property
    def is_unreadable(self) -> bool:
        """Rather than left out for its name or its place."""
        return self.reason not in BY_PLACE and self.suffix is None

    @property
    def is_expected(self) -> bool:
        """Everybody's folders have such things in them: nobody misses them."""
        return self.reason in (OWN, HIDDEN) and not self.images


@dataclass(frozen=True)
class Samples:
    """Labelled image files; of millions, strings take less memory than `Path` objects."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    """Indices into `classes`."""
    classes: tuple[str, ...]
    hashes: tuple[str, ...] = ()
    """SHA-256 of each file's content; empty until the files have been read."""
    groups: tuple[str, ...] = ()
    """Of what belongs together, such as a patient's images; empty: every image stands alone."""
    weights: tuple[float, ...] = ()
    """Of each image; empty: all weigh the same."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> "Samples":
        """Some of the samples, in the order of `indices`."""
        chosen = list(indices)
        given = {name: values for name in _COLUMNS if (values := getattr(self, name))}
        taken = {name: tuple(values[i] for i in chosen) for name, values in given.items()}
        return replace(self, **taken)

    def in_order(self) -> "Samples":
        """By (class, SHA-256, occurrence), so that the same images are in the same order, and give
        the same weights, whatever held them.
        """
        keys = list(zip(self.labels, self.hashes, strict=True))
        return self.take(sorted(range(len(self)), key=keys.__getitem__))

    def without(self, hashes: Iterable[str]) -> "Samples":
        """Those whose content is not among `hashes`."""
        excluded = set(hashes)
        return self.take(i for i, digest in enumerate(self.hashes) if digest not in excluded)

    def contradictions(self) -> list[tuple[str, str]]:
        """Pairs of files with the same content under two classes: one label is wrong."""
        first: dict[str, int] = {}
        pairs = []
        for i, (digest, label) in enumerate(zip(self.hashes, self.labels, strict=True)):
            other = first.setdefault(digest, i)
            if self.labels[other] != label:
                pairs.append((self.paths[other], self.paths[i]))
        return pairs

    def once(self) -> "Samples":
        """Each content once: the first of files that are the same."""
        first = {digest: i for i, digest in reversed(list(enumerate(self.hashes)))}
        return self.take(sorted(first.values()))

    @cached_property
    def names(self) -> tuple[object, ...]:
        """What names each image wherever it stands: its hash, with a number where another image
        before it has the same; its position where nobody has read the contents.
        """
        if not self.hashes:
            return tuple(range(len(self)))
        seen: Counter[str] = Counter()
        names: list[object] = []
        for digest in self.hashes:
            names.append((digest, seen[digest]) if seen[digest] else digest)
            seen[digest] += 1
        return tuple(names)

    def counts(self) -> tuple[int, ...]:
        """Images per class, in the order of `classes`."""
        return tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())

    def counts_by_class(self) -> dict[str, int]:
        return dict(zip(self.classes, self.counts(), strict=True))

    def empty_classes(self) -> list[str]:
        """Those without any image."""
        return [name for name, count in self.counts_by_class().items() if not count]


def join(parts: Sequence[Samples]) -> Samples:
    """One after the other; all must have the same classes."""
    joined = {name: tuple(v for part in parts for v in getattr(part, name)) for name in _COLUMNS}
    return replace(parts[0], **joined)


@dataclass(frozen=True)
class Dataset:
    """Labelled images of a source by split, each file read once; no caller knows a folder."""

    source: str
    """What the user named, for messages."""
    splits: Mapping[SplitName, Samples]
    """Those that the source separates and that were asked for; of one that separates none, train
    is all."""
    skipped: tuple[Skipped, ...]
    """All else that the source holds, apart from splits that were not asked for; by path."""
    notes: tuple[str, ...] = ()
    """What was understood otherwise than a reader might expect; sentences."""
    contradictions: tuple[tuple[str, str], ...] = ()
    """Of all that was read, once train and val are settled: see `Samples`."""

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.splits.values())).classes

    @property
    def train(self) -> Samples:
        return self.splits["train"]

    @property
    def val(self) -> Samples | None:
        return self.splits.get("val")

    @property
    def samples(self) -> Samples:
        """Of all splits, one after the other."""
        return join(list(self.splits.values()))
