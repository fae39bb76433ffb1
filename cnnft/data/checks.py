"""What is wrong with a dataset, found before training on it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from cnnft.config.texts import Channels
from cnnft.data.dataset import Dataset, Skipped, SplitName
from cnnft.data.statistics import ChannelSums, without_padding
from cnnft.data.transforms import InputSpec, evaluation_crop, to_tensor
from cnnft.errors import CnnftError
from cnnft.machine.memory import available

NEAR = 6
"""Two images whose fingerprints differ in so many of 128 bits look the same."""
_CROPS_SHARE = 0.25
"""Of the free memory may be filled with crops."""
_BANDS = 8  # of 16 bits: more than NEAR, so that near fingerprints agree in one of them

PLAIN = InputSpec(224, 0.875, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""How most networks see images, for statistics without a backbone."""

Group = tuple[str, ...]


@dataclass(frozen=True)
class DataCheck:
    """Findings on the images of all splits; paths are sorted."""

    counts: dict[SplitName, dict[str, int]]
    """Split -> class -> images."""
    skipped: tuple[Skipped, ...]
    duplicates: tuple[Group, ...]
    """Files with the same content."""
    near_duplicates: tuple[Group, ...]
    """Files that look the same (resaved, resized), exact duplicates aside."""
    leaks: tuple[Group, ...]
    """Data leaks: groups of either kind that have an image in train and one in another split."""
    contradictions: tuple[Group, ...]
    """Groups of either kind whose images are in different classes (label conflicts)."""
    sizes: dict[str, int]
    """Smallest, median and largest of the shorter sides, in pixels."""
    modes: dict[str, int]
    """Colour mode of the files (RGB, L, CMYK, …) -> images."""
    mean: Channels
    std: Channels
    """Of the training images as the network sees them, 255 being 1."""

    @property
    def imbalance(self) -> float:
        """Images of the largest training class per image of the smallest."""
        counts = next(iter(self.counts.values())).values()
        return max(counts) / max(min(counts), 1)


@dataclass(frozen=True)
class ImageFacts:
    """What is found in one image while it is decoded."""

    size: tuple[int, int]
    mode: str
    """Colour mode of the file."""
    fingerprint: int
    channels: ChannelSums
    """Of what the network sees."""
    crop: Image.Image | None
    """What evaluation sees, where memory had room to keep it."""


class Inspector:
    """image -> `ImageFacts`, for `inspect_dataset`; threads may share one."""

    def __init__(self, spec: InputSpec, keep_crops: bool) -> None:
        self.spec = spec
        self.room = _CROPS_SHARE * available(torch.device("cpu")) if keep_crops else 0.0

    def __call__(self, image: Image.Image, mode: str) -> ImageFacts:
        crop = evaluation_crop(image, self.spec)
        plain = without_padding(self.spec)
        seen = crop if plain == self.spec else evaluation_crop(image, plain)
        self.room -= 3 * self.spec.size**2
        return ImageFacts(
            size=image.size,
            mode=mode,
            fingerprint=fingerprint(image),
            channels=ChannelSums.of(to_tensor(seen).flatten(1)),
            crop=crop if self.room >= 0 else None,
        )


def check_dataset(dataset: Dataset, facts: Mapping[str, ImageFacts]) -> DataCheck:
    """Findings on a dataset as the user has split it; `facts`: path -> what was found in it.

    Raises:
        CnnftError: none of its training images can be read.
    """
    if not len(dataset.train):
        raise CnnftError(f"{dataset.source}: no training image can be read")
    splits = dataset.splits
    everything = dataset.samples
    split_of = {path: name for name, samples in splits.items() for path in samples.paths}
    class_of = dict(zip(everything.paths, everything.labels, strict=True))
    exact = _groups(zip(everything.paths, everything.hashes, strict=True))
    near = _near_groups({path: facts[path].fingerprint for path in everything.paths}, exact)
    alike = [*exact, *near]
    shorter = sorted(min(fact.size) for fact in facts.values())
    mean, std = ChannelSums.total(
        facts[path].channels for path in dataset.train.paths
    ).mean_and_std()
    return DataCheck(
        counts={name: samples.counts_by_class() for name, samples in splits.items()},
        skipped=dataset.skipped,
        duplicates=tuple(exact),
        near_duplicates=tuple(near),
        leaks=tuple(
            group
            for group in alike
            if len({split_of[path] for path in group}) > 1
            and any(split_of[path] == "train" for path in group)
        ),
        contradictions=tuple(
            group for group in alike if len({class_of[path] for path in group}) > 1
        ),
        sizes={
            "smallest": shorter[0],
            "median": shorter[len(shorter) // 2],
            "largest": shorter[-1],
        },
        modes=dict(Counter(fact.mode for fact in facts.values()).most_common()),
        mean=mean,
        std=std,
    )


def fingerprint(image: Image.Image) -> int:
    """128 bits: whether each of 8 × 8 cells is brighter than its right, and its lower neighbour.

    Survives resizing and resaving (the difference hash of N. Krawetz, 2013, in both directions).
    """
    small = image.convert("L").resize((9, 9), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)
    bits = np.concatenate(
        [(grey[:-1, :-1] > grey[:-1, 1:]).ravel(), (grey[:-1, :-1] > grey[1:, :-1]).ravel()]
    )
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _groups(keyed: Iterable[tuple[str, object]]) -> list[Group]:
    found: dict[object, list[str]] = {}
    for path, key in keyed:
        found.setdefault(key, []).append(path)
    return sorted(tuple(sorted(paths)) for paths in found.values() if len(paths) > 1)


def _near_groups(fingerprints: dict[str, int], exact: list[Group]) -> list[Group]:
    """Groups connected by near fingerprints; of exact duplicates only the first one counts."""
    others = {path for group in exact for path in group[1:]}
    # Flat pictures have hardly a bit set and all look alike.
    kept = [
        (path, bits)
        for path, bits in fingerprints.items()
        if path not in others and 16 <= bits.bit_count() <= 112
    ]
    parent = list(range(len(kept)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for band in range(_BANDS):
        buckets: dict[int, list[int]] = {}
        for i, (_, bits) in enumerate(kept):
            part = bits >> (16 * band) & 0xFFFF
            if part not in (0, 0xFFFF):  # a plain border, which thousands may share
                buckets.setdefault(part, []).append(i)
        for bucket in buckets.values():
            for position, i in enumerate(bucket):
                for j in bucket[position + 1 :]:
                    if (kept[i][1] ^ kept[j][1]).bit_count() <= NEAR:
                        parent[root(j)] = root(i)
    return _groups((path, root(i)) for i, (path, _) in enumerate(kept))
