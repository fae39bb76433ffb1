"""What training and validation read: pixels, or features of the frozen layers before a cut."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnft.cache import store
from cnnft.cache.features import (
    FeatureBatches,
    FeatureExtractor,
    Features,
    ViewBatches,
    fits,
)
from cnnft.cache.pixels import (
    CachedImages,
    CacheProgress,
    cache_images,
    require_room,
    training_pixels,
)
from cnnft.cache.views import ViewSet, evaluation_view_set, pixel_batches
from cnnft.data.augmentation import augmentation, training_transform
from cnnft.data.images import decoder_versions
from cnnft.data.loading import ImageFiles, TrainingBatches, TrainingImages, Views, view_batches
from cnnft.data.sampler import Key
from cnnft.data.transforms import EvaluationViews
from cnnft.inference.predict import Ensemble
from cnnft.machine import distributed
from cnnft.models.freezing import SMALL_BATCH, changing
from cnnft.models.surgery.cut import Cut, find_cut
from cnnft.training.plan import Plan

STATISTICS_IMAGES = 512
"""That BatchNorm statistics are recomputed from: about as many as a momentum of 0.1 averages over
in batches of 32."""

_log = logging.getLogger(__name__)


class Feed:
    """The batches of a run. What every epoch reads is decoded, or computed, once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        spec, of = plan.classifier.input_spec, Path(plan.config.dataset.data).name
        pixels, timeout = training_pixels(plan.config.input, spec), plan.loading.read_timeout
        files = ImageFiles(plan.train.paths, pixels, read_timeout=timeout)
        crops = ImageFiles(plan.val.paths, crop=spec, read_timeout=timeout)
        train, val = f"{len(plan.train)} training images of {of}", f"{len(plan.val)} of {of} (val)"
        self.images = CachedImages(files, plan.train.hashes, train)
        self.val_images = CachedImages(crops, plan.val.hashes, val)
        transform = training_transform(spec, augmentation(plan.config.augmentation))
        self.dataset = TrainingImages(plan.train, transform, plan.config.training.seed, self.images)
        self.validation: Iterable[Views] = view_batches(
            plan.val.paths,
            EvaluationViews(spec).of_crop,
            plan.loading,
            self.val_images,
        )
        self._cut: Cut | None = None
        self._features: Tensor | None = None

    def require_room(self) -> None:
        """Raises `CnnftError` where --cache names a place that cannot hold the decoded images."""
        if self.plan.batches.views is None:
            images, cache = (self.images, self.val_images), self.plan.config.machine.cache
            distributed.broadcast_from_main(lambda: require_room(images, cache))

    def tail(self, network: nn.Module) -> nn.Module:
        """What computes logits from what is read; `network` has the plan's architecture."""
        if isinstance(network, Ensemble):
            return Ensemble([self.tail(one) for one in network.networks])
        return network if self._cut is None else self._cut.tail(network)

    def training(self, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from `first_step` on."""
        return iter(self._batches(replace(self.plan.batches, first_step=first_step)))

    @cached_property
    def first(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The first batches, which BatchNorm statistics are recomputed from: images are mixed, and
        look as they do in training. May be iterated again.
        """
        batches = self.plan.batches
        steps = min(-(-STATISTICS_IMAGES // batches.batch_size), batches.steps_per_epoch)
        together = -(-SMALL_BATCH // batches.batch_size)
        groups = [range(steps)[first : first + together] for first in range(0, steps, together)]
        return self._batches([[key for s in group for key in batches.part(s)] for group in groups])

    def _batches(self, keys: Iterable[list[Key]]) -> Iterable[tuple[Tensor, Tensor]]:
        if self._features is not None:
            labels = torch.tensor(self.plan.train.labels)
            return FeatureBatches(self._features, labels, keys)
        return TrainingBatches(self.dataset, keys, self.plan.loading)

    def prepare(self, stop: Callable[[], bool]) -> Generator[CacheProgress, None, bool]:
        """Decode, or compute, what every epoch reads; returns whether the caller asks to stop."""
        with closing(self._fill_caches()) as progress:
            for event in progress:
                yield event
                if stop() and distributed.world_size == 1:  # of several all have to stop together
                    break
        return any(distributed.any_rank(stop()))

    def _fill_caches(self) -> Generator[CacheProgress]:
        config, views = self.plan.config, self.plan.batches.views
        if views is None or (extractor := self._extractor(views)) is None:
            yield from cache_images(
                [self.images, self.val_images], config.machine.cache, config.training.epochs
            )
            return
        on_disk = config.machine.cache != "ram"
        train = Features(extractor, self._training_views(views), on_disk)
        val = Features(extractor, self._validation_views(), on_disk)
        if len(train.missing) > len(self.plan.train):  # of several views
            yield from cache_images([self.images], config.machine.cache, views)
        total = len(train.missing) + len(val.missing)
        for part, before in ((train, 0), (val, len(train.missing))):
            for done in part.compute():
                yield CacheProgress(before + done, total, "computing features of")
        if not total:
            _log.info(
                "all features of the frozen layers are read from the cache (%s)", store.root()
            )
        self.images.cached = None  # read for the last time
        self._cut = extractor.cut
        self._features = train.values.unflatten(0, (-1, len(self.plan.train)))
        self.validation = ViewBatches(val.values, self.plan.loading.batch_size)

    def _extractor(self, views: int) -> FeatureExtractor | None:
        """The frozen layers before the cut; None where their features cannot be cached."""
        plan, classifier = self.plan, self.plan.classifier
        config = plan.config
        if config.machine.cache == "off" or config.augmentation.mixes:
            return None
        if plan.teachers and augmentation(config.augmentation).random:
            return None  # teachers need the pixels of every step
        size = classifier.input_spec.size
        cut = distributed.broadcast_from_main(lambda: find_cut(classifier.network, size))
        if cut is None:
            _log.info(
                "this backbone cannot be cut where its frozen layers end: features are not cached"
            )
            return None
        extractor = FeatureExtractor(
            classifier.network, cut, classifier.identity, classifier.pretrained_hash
        ).folded(size, changing(classifier.network))
        count = views * len(plan.train) + len(plan.val)
        if distributed.any_rank(not fits(extractor, size, count))[0]:
            _log.warning(
                "the features of the frozen layers do not fit in memory: they are not cached"
            )
            return None
        return extractor

    def _training_views(self, views: int) -> ViewSet:
        config, names = self.plan.config, self.plan.train.names
        spec, parts = self.plan.classifier.input_spec, augmentation(config.augmentation)
        transform = (
            "training",
            spec,
            parts,
            config.training.seed,
            self.images.files.pixels,
            decoder_versions(),
        )
        keys: list[Key] = [(view, index) for view in range(views) for index in range(len(names))]
        view_names = [(view, names[index]) for view, index in keys]

        def batches(rows: Sequence[int]) -> Iterator[Tensor]:
            return pixel_batches(self.dataset, [keys[row] for row in rows], self.plan.loading)

        size = self.plan.loading.batch_size
        return ViewSet(transform, view_names, batches, size, self.images.about)

    def _validation_views(self) -> ViewSet:
        spec = self.plan.classifier.input_spec
        images = self.val_images
        return evaluation_view_set(self.plan.val, spec, images, self.plan.loading, images.about)
