"""The linear probe: what a linear classifier makes of frozen features."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import distributed
from cnnft.advice import Advice, advise
from cnnft.backbones import Backbone
from cnnft.batches import ImageFiles, keyed_seed
from cnnft.config import Config
from cnnft.cutting import Cut, find_cut
from cnnft.data import Samples
from cnnft.featurecache import Activations, Frozen, evaluation_looks
from cnnft.freezing import freeze
from cnnft.heads import classifier_layer, initialise
from cnnft.pretrained import backbone_hash
from cnnft.transforms import InputSpec

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties on standardised features, among which cross-validation chooses."""
FOLDS = 5
_MOST = 5000  # images that cross-validation looks at
_MOST_FITTED = 50_000
_LEAST_SPREAD = 0.01  # of the median feature's

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on frozen features: logits = values @ weight.T + bias."""

    weight: Tensor
    bias: Tensor
    accuracy: float
    """In cross-validation over the training images."""
    strength: float


@dataclass(frozen=True)
class Probed:
    """What a probe of the training images found."""

    advice: Advice | None
    fitted: Probe | None
    """None where the classifier is no single linear layer, which it could be."""


def wants_probe(config: Config) -> bool:
    """Whether the head is to start from a linear probe, where it is one linear layer."""
    if config.probe_first is not None:
        return config.probe_first
    trains_more = config.mode in ("finetune", "bn-only") and config.train_stages != 0
    plain = config.head == "linear" and config.head_init == "default"
    return config.pretrained and trains_more and plain


def probe(
    config: Config, backbone: Backbone, spec: InputSpec, samples: Samples, workers: int
) -> Probed:
    """Fit a linear classifier on frozen features of the training images, each content once.

    Afterwards all but the head is frozen, and the head is drawn anew.
    """
    cut = _cut_before_head(backbone, spec)
    linear = _is_linear(backbone, cut)
    if not linear and config.mode != "auto":
        return Probed(None, None)
    first = {digest: i for i, digest in reversed(list(enumerate(samples.hashes)))}
    samples = samples.take(sorted(first.values()))
    _log.info("probing the frozen features of %d training images", len(samples))
    values = _features(cut or _inside_head(backbone), config, backbone, spec, samples, workers)
    labels, counts = torch.tensor(samples.labels), samples.counts()
    classes = len(samples.classes)
    fitted = distributed.by_main(lambda: fit_probe(values, labels, classes, config.seed))
    advice = advise(len(samples) / len(counts), fitted.accuracy, max(counts) / len(samples))
    return Probed(advice, fitted if linear else None)


def takes_probe(backbone: Backbone, spec: InputSpec) -> bool:
    """Whether the head is one linear layer, and nothing follows it, so that `probe` fits one.

    Does to the network what `probe` does.
    """
    return _is_linear(backbone, _cut_before_head(backbone, spec))


def _cut_before_head(backbone: Backbone, spec: InputSpec) -> Cut | None:
    network, head = backbone.network, backbone.head
    initialise(network, head, "default")  # behind heads of zeros, which some have, nothing is seen
    freeze(network, head, backbone.stages, "feature-extractor")
    return distributed.by_main(lambda: find_cut(network, spec.size, evaluating=True))


def _is_linear(backbone: Backbone, cut: Cut | None) -> bool:
    tail = None if cut is None else cut.tail(backbone.network)
    return isinstance(tail, nn.Linear) and tail.bias is not None


def _inside_head(backbone: Backbone) -> Cut:
    """One of several heads on different features, which distilled networks have."""
    layers = {name.rpartition(".")[0] for name in backbone.head}
    return Cut(min(path for path in layers if "aux" not in path.lower()), frozenset())


def _features(
    cut: Cut, config: Config, backbone: Backbone, spec: InputSpec, samples: Samples, workers: int
) -> Tensor:
    """(N, D): what enters the head, of each image as evaluation sees it."""
    frozen = Frozen.before(
        cut,
        backbone.network,
        spec.size,
        identity=backbone.identity,
        weights=backbone_hash(backbone.network, backbone.head),
        about=f"{backbone.identity.name}, {len(samples)} of {Path(config.data).name} (probe)",
        pooled=True,
    )
    pinned = next(backbone.network.parameters()).device.type == "cuda"
    crops, size = ImageFiles(samples.paths, crop=spec), config.images_at_once
    looks = evaluation_looks(samples, spec, crops, size, workers, pinned)
    # A probe magnifies the last digits, which depend on how they are computed.
    looks = replace(looks, how=(looks.how, size, torch.get_num_threads()))
    activations = Activations(frozen, looks, config.cache in ("auto", "disk"))
    for _ in activations.compute():
        pass
    return activations.values


def fit_probe(values: Tensor, labels: Tensor, classes: int, seed: int) -> Probe:
    """Choose the penalty by cross-validation, then fit all images with it."""
    picked = _some(len(values), seed, _MOST)
    scores = {s: _cross_validate(values[picked], labels[picked], classes, s) for s in STRENGTHS}
    strength = max(STRENGTHS, key=lambda s: (scores[s], s))
    fitted = _some(len(values), seed, _MOST_FITTED)
    weight, bias = fit(values[fitted], labels[fitted], classes, strength)
    return Probe(weight, bias, scores[strength], strength)


def install(network: nn.Module, head: frozenset[str], fitted: Probe) -> None:
    """Make the probe the network's head."""
    _, layer = classifier_layer(network, head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(fitted.weight)
        layer.bias.copy_(fitted.bias)


def fit(values: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """(weight (C, D), bias (C,)) that minimise mean cross-entropy + strength / 2 · ‖weight‖².

    The penalty is on the weights of standardised features; L-BFGS (Liu and Nocedal, 1989) in
    double precision.
    """
    x = values.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    # A feature that hardly varies in training must not decide: it may be large elsewhere.
    std = std.clamp(min=max(_LEAST_SPREAD * float(std.median()), 1e-8))
    x = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = strength / 2 * weight.square().sum()
        loss: Tensor = cross_entropy(x @ weight.T + bias, labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        original = weight / std
        return original.float(), (bias - original @ mean).float()


def _cross_validate(values: Tensor, labels: Tensor, classes: int, strength: float) -> float:
    """Accuracy over folds that each hold their share of every class."""
    order = torch.argsort(labels, stable=True)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % min(FOLDS, len(order))
    correct = 0
    for held_out in fold.unique():
        inside = fold != held_out
        weight, bias = fit(values[inside], labels[inside], classes, strength)
        predicted = (values[~inside] @ weight.T + bias).argmax(dim=1)
        correct += int((predicted == labels[~inside]).sum())
    return correct / len(labels)


def _some(n: int, seed: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(keyed_seed("probe", seed))
    return torch.randperm(n, generator=generator)[:most]
