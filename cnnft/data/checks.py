"""What is wrong with a dataset, found before training on it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from cnnft.config.texts import Channels
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName
from cnnft.data.nearduplicates import Thumbnail, near_duplicates, stars, thumbnail
from cnnft.data.statistics import ChannelSums, without_padding
from cnnft.data.transforms import InputSpec, evaluation_crop, to_tensor
from cnnft.errors import CnnftError
from cnnft.machine.memory import available

_CROPS_SHARE = 0.25
"""Of the free memory may be filled with crops."""

PLAIN = InputSpec(224, 0.875, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""How most networks see images, for statistics without a backbone."""

Group = tuple[str, ...]


@dataclass(frozen=True)
class DataCheck:
    """Findings on the images of all splits."""

    counts: dict[SplitName, dict[str, int]]
    """Split -> class -> images."""
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    """Of the `Dataset`."""
    duplicates: tuple[Group, ...]
    """Files with the same content."""
    near_duplicates: tuple[Group, ...]
    """Files that look like the first of them (resaved, resized), exact duplicates aside."""
    leaks: tuple[Group, ...]
    """Data leaks: images in train and in another split, the same or alike."""
    contradictions: tuple[Group, ...]
    """Images in different classes (label conflicts), the same or alike."""
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
    thumbnail: Thumbnail
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
            thumbnail=thumbnail(image),
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
    exact = _groups(everything)
    others = {path for group in exact for path in group[1:]}
    paths = [path for path in everything.paths if path not in others]
    near = near_duplicates([facts[path].thumbnail for path in paths])

    def among(exact_too: bool, differ: Callable[[str, str], bool]) -> tuple[Group, ...]:
        """Groups of what is the same, or looks so, and differs in something else."""
        groups = [group for group in exact if exact_too and _any_pair(group, differ)]
        pairs = [(i, j) for i, j in near if differ(paths[i], paths[j])]
        return (*groups, *sorted(tuple(paths[i] for i in star) for star in stars(pairs)))

    shorter = sorted(min(fact.size) for fact in facts.values())
    mean, std = ChannelSums.total(
        facts[path].channels for path in dataset.train.paths
    ).mean_and_std()
    return DataCheck(
        counts={name: samples.counts_by_class() for name, samples in splits.items()},
        skipped=dataset.skipped,
        notes=dataset.notes,
        duplicates=tuple(exact),
        near_duplicates=among(False, lambda a, b: True),
        leaks=among(True, lambda a, b: (split_of[a] == "train") != (split_of[b] == "train")),
        contradictions=among(True, lambda a, b: class_of[a] != class_of[b]),
        sizes={
            "smallest": shorter[0],
            "median": shorter[len(shorter) // 2],
            "largest": shorter[-1],
        },
        modes=dict(Counter(fact.mode for fact in facts.values()).most_common()),
        mean=mean,
        std=std,
    )


def _groups(samples: Samples) -> list[Group]:
    """Files with the same content."""
    found: dict[str, list[str]] = {}
    for path, digest in zip(samples.paths, samples.hashes, strict=True):
        found.setdefault(digest, []).append(path)
    return sorted(tuple(sorted(paths)) for paths in found.values() if len(paths) > 1)


def _any_pair(group: Group, differ: Callable[[str, str], bool]) -> bool:
    return any(differ(group[0], path) for path in group[1:])
