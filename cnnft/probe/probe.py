"""The linear probe: what a linear classifier makes of a backbone's frozen features."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from cnnft.cache.features import FeatureExtractor, Features
from cnnft.cache.views import evaluation_view_set
from cnnft.data.dataset import Samples
from cnnft.data.loading import ImageFiles, Loading
from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError
from cnnft.machine import distributed
from cnnft.models.backbones import Backbone
from cnnft.models.heads import classifier_layer, initialise
from cnnft.models.surgery.cut import Cut
from cnnft.models.surgery.embed import find_head
from cnnft.models.weights import backbone_hash
from cnnft.probe.folds import FOLDS, assign_folds
from cnnft.probe.solve import Linear, Solved, solve

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probed:
    """What a probe of the training images found."""

    solved: Solved
    installable: bool
    """Whether the head is one linear layer on these features, which the probe could be."""


def probe(
    backbone: Backbone,
    spec: InputSpec,
    samples: Samples,
    loading: Loading,
    fitting: "Fitting",
    crops: Mapping[str, Image.Image] | None = None,
) -> Probed | None:
    """Fit a linear classifier on frozen features of the training images, each content once.

    None where it could not be the head, and `fitting.always` is off. Afterwards the head is drawn
    anew; what trains is as before. `crops`: path -> what evaluation sees, where it was decoded
    before.

    Raises:
        CnnftError: with `fitting.always`, no module makes logits of features.
    """
    network = backbone.network
    # Behind a head of zeros any layer would seem to make the logits.
    initialise(network, backbone.head, "default")
    place = distributed.broadcast_from_main(lambda: find_head(network, backbone.head, spec.size))
    if place is None and fitting.always:
        raise CnnftError(f"{backbone.identity.name} has no features that a probe could classify")
    if place is None or not (place.linear or fitting.always):
        return None
    samples = samples.once()
    _log.info("probing the frozen features of %d training images", len(samples))
    images = ImageFiles(samples.paths, crop=spec, decoded=crops or {})
    values = _features(place.cut, backbone, samples, images, loading, fitting)
    labels, folds = torch.tensor(samples.labels), assign_folds(samples, FOLDS)
    classes, weights = len(samples.classes), fitting.class_weights
    solved = distributed.broadcast_from_main(
        lambda: solve(values[None], labels, classes, folds, weights)
    )
    return Probed(solved, place.linear)


@dataclass(frozen=True)
class Fitting:
    """How a probe is fitted."""

    class_weights: Tensor | None = None
    """(C,), of the loss; None: every image weighs the same."""
    always: bool = False
    """Also where the head is no single linear layer, for the accuracy alone."""
    on_disk: bool = True
    """Whether features are cached on the disk for later runs."""
    about: str = ""
    """Describes the images in `cnnft cache`."""


def install(network: nn.Module, head: frozenset[str], linear: Linear) -> None:
    """Make it the network's head."""
    _, layer = classifier_layer(network, head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(linear.weight)
        layer.bias.copy_(linear.bias)


def _features(
    cut: Cut,
    backbone: Backbone,
    samples: Samples,
    images: ImageFiles,
    loading: Loading,
    fitting: Fitting,
) -> Tensor:
    """(N, D): what enters the head, of each image as evaluation sees it."""
    spec = images.crop
    assert spec is not None
    extractor = FeatureExtractor(
        backbone.network,
        cut,
        backbone.identity,
        backbone_hash(backbone.network, backbone.head),
        pooled=True,
        rounding=(loading.batch_size, torch.get_num_threads()),
    )
    about = f"{len(samples)} of {fitting.about} (probe)"
    views = evaluation_view_set(samples, spec, images, loading, about)
    features = Features(extractor.folded(spec.size, backbone.head), views, fitting.on_disk)
    for _ in features.compute():
        pass
    return features.values
