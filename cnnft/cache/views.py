"""Views of images whose features are computed: what tells them apart, and their pixels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cnnft.data.dataset import Samples
from cnnft.data.images import decoder_versions
from cnnft.data.loading import Images, Loading, TrainingBatches, TrainingImages
from cnnft.data.sampler import Key
from cnnft.data.transforms import EvaluationViews, InputSpec

PixelsOf = Callable[[Sequence[int]], Iterable[Tensor]]
"""Rows of the names in a `ViewSet` -> their pixels, in batches (B, 3, H, W)."""


@dataclass(frozen=True)
class ViewSet:
    """Views of images: what they are, and their pixels."""

    transform: object
    """All that the pixels depend on besides the names, for the key; its `repr` counts."""
    names: Sequence[object]
    """What tells the views apart, such as an image's SHA-256 and the number of the view."""
    batches: PixelsOf
    batch_size: int
    """B, but for the last batch."""
    about: str = ""
    """Describes them in `cnnft cache`."""


def evaluation_view_set(
    samples: Samples,
    spec: InputSpec,
    images: Images,
    loading: Loading,
    about: str,
    mirrored: bool = False,
) -> ViewSet:
    """As evaluation sees the samples; `images` are what `evaluation_crop` makes of them.

    `mirrored`: what it sees of their mirror images.
    """
    transform = ("mirrored" if mirrored else "evaluation", spec, decoder_versions())
    dataset = TrainingImages(samples, EvaluationViews(spec).normalize, 0, images)

    def batches(rows: Sequence[int]) -> Iterator[Tensor]:
        found = pixel_batches(dataset, [(0, index) for index in rows], loading)
        return (pixels.flip(3) for pixels in found) if mirrored else found

    return ViewSet(transform, samples.hashes, batches, loading.batch_size, about)


def pixel_batches(
    dataset: TrainingImages, keys: Sequence[Key], loading: Loading
) -> Iterator[Tensor]:
    """(B, 3, H, W) of all keys, in order."""
    size = loading.batch_size
    batches = [list(keys[start : start + size]) for start in range(0, len(keys), size)]
    loading = loading if len(batches) > 1 else replace(loading, workers=0)
    for pixels, _ in TrainingBatches(dataset, batches, loading):
        yield pixels
