"""The network of a plan: backbone, probe, head, and what of it trains."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from cnnft.config.choices import Mode
from cnnft.config.pixels import InputConfig
from cnnft.config.schema import Config
from cnnft.config.solving import solves_head
from cnnft.config.texts import parse_statistics
from cnnft.data.dataset import Dataset, Samples
from cnnft.data.loading import Loading
from cnnft.data.sampler import keyed_seed
from cnnft.data.statistics import channel_statistics
from cnnft.data.transforms import InputSpec
from cnnft.errors import UsageError
from cnnft.inference.classifier import Classifier
from cnnft.machine import distributed
from cnnft.machine.devices import place
from cnnft.models.backbones import Backbone, open_backbone, with_stages
from cnnft.models.freezing import freeze, trained_parameters
from cnnft.models.heads import add_dropout, initialise, replace_by_mlp
from cnnft.models.surgery.embed import find_head
from cnnft.models.surgery.stagehead import head_stages
from cnnft.models.weights import backbone_hash
from cnnft.probe.probe import Fitting, Probed, install, probe
from cnnft.training.batchsize import largest_batch
from cnnft.training.losses import balanced_weights

MOST_SOLVED = 200_000
"""Images: beyond, their features in float64 are too much for memory."""

_log = logging.getLogger(__name__)


def open_network(config: Config, classes: int, device: torch.device) -> Backbone:
    # Where weights are random.
    torch.default_generator.manual_seed(keyed_seed("backbone", config.training.seed))
    backbone = open_backbone(
        config.network.backbone,
        classes,
        pretrained=config.network.pretrained,
        weights=config.network.weights,
        image_size=config.input.image_size,
        auxiliary=trains_auxiliary(config),
        drop_path=config.network.drop_path,
    )
    # What cannot train is refused before anything is computed.
    trained_parameters(backbone.network, backbone.head, backbone.stages, *_freezing(config))
    place(backbone.network, device)
    return backbone


def _freezing(config: Config) -> tuple[Mode, int | None]:
    return config.freezing.mode, config.freezing.train_stages


def trains_auxiliary(config: Config) -> bool:
    """Auxiliary classifiers train with the layers below them, or not at all."""
    return config.freezing.mode == "finetune" and config.freezing.train_stages is None


def open_settled(
    config: Config, dataset: Dataset, device: torch.device, *, auto: bool, begun: bool
) -> tuple[Config, Backbone]:
    """The backbone, and how its head is found: by steps, where it cannot be solved.

    In mode `auto` all layers train then.

    Raises:
        UsageError: --head-solver lbfgs was given.
    """
    classes = len(dataset.classes)
    backbone = open_network(config, classes, device)
    if not solves_head(config):
        return config, backbone
    if begun:  # by a cnnft that did not solve heads
        return config.replace(head_solver="sgd"), backbone
    reason = _why_not_solved(backbone, len(dataset.samples))
    if reason is None:
        return config, backbone
    if config.freezing.head_solver == "lbfgs":
        raise UsageError(f"--head-solver lbfgs: {reason}")
    if config.freezing.features == "stages":
        raise UsageError(f"--features stages: {reason}")
    _log.info("the head is trained by steps: %s", reason)
    if not auto:
        return config.replace(head_solver="sgd"), backbone
    config = config.replace(mode="finetune")
    return config, open_network(config, classes, device)


def _why_not_solved(backbone: Backbone, images: int) -> str | None:
    size = backbone.input_spec.size
    found = distributed.broadcast_from_main(
        lambda: find_head(backbone.network, backbone.head, size)
    )
    if images > MOST_SOLVED:
        return f"{images} images are more than the {MOST_SOLVED} that one is solved on"
    if found is None or not found.linear:
        return "this backbone's classifier is no single linear layer"
    return None


def settle_features(config: Config, backbone: Backbone) -> tuple[Backbone, Backbone | None]:
    """The backbone with the head that is asked for, and with the other that the solver may choose.

    Raises:
        UsageError: --features stages, and the backbone has none that can be read.
    """
    features = config.freezing.features
    if not solves_head(config) or features == "last":
        return backbone, None
    staged = with_stages(backbone)
    if features == "auto":
        return backbone, staged
    if staged is None:
        raise UsageError(
            f"--features stages: {config.network.backbone} has no stage whose output adds to what "
            "enters its head: take --features last"
        )
    return staged, None


def settle_input(
    config: InputConfig, spec: InputSpec, samples: Samples, loading: Loading
) -> InputSpec:
    """The backbone's, with the user's `fit` and `normalize`."""
    spec = spec if config.fit is None else replace(spec, fit=config.fit)
    if config.normalize == "pretrained":
        return spec
    if config.normalize == "dataset":
        mean, std = channel_statistics(samples.paths, spec, loading)
    else:
        mean, std = parse_statistics(config.normalize)
    return replace(spec, mean=mean, std=std)


def wants_probe(config: Config) -> bool:
    """Whether the head is to start from a linear probe, where it is one linear layer."""
    network, freezing = config.network, config.freezing
    if freezing.probe_first is not None:
        return freezing.probe_first
    trains_more = freezing.mode in ("finetune", "bn-only") and freezing.train_stages != 0
    plain = network.head == "linear" and network.head_init == "default"
    return network.pretrained and trains_more and plain


def probe_network(
    config: Config, backbone: Backbone, spec: InputSpec, train: Samples, loading: Loading
) -> Probed | None:
    if not wants_probe(config):
        return None
    weights = balanced_weights(train.once().counts()) if config.balanced else None
    fitting = Fitting(
        class_weights=weights,
        on_disk=config.machine.cache in ("auto", "disk"),
        about=Path(config.dataset.data).name,
    )
    return probe(backbone, spec, train, loading, fitting)


def new_head(config: Config, backbone: Backbone) -> frozenset[str]:
    """Put the new head on the backbone, initialised by the seed alone; its tensors' names."""
    network, head = backbone.network, backbone.head
    device = next(network.parameters()).device
    network.cpu()  # each device draws numbers of its own
    if config.network.head == "mlp":
        head = replace_by_mlp(network, head)
    torch.default_generator.manual_seed(keyed_seed("head", config.training.seed))
    initialise(network, head, config.network.head_init)
    network.to(device)
    return head


def install_probe(
    config: Config, backbone: Backbone, head: frozenset[str], probed: Probed | None
) -> bool:
    """Whether the head is the probe from here on."""
    if probed is not None and probed.installable and wants_probe(config):
        install(backbone.network, head, probed.solved.linear)
        return True
    if config.freezing.probe_first and (probed is None or not probed.installable):
        raise UsageError("--probe-first: this backbone's classifier is no single linear layer")
    return False


def settle_network(
    config: Config, backbone: Backbone, head: frozenset[str], spec: InputSpec, images: int
) -> tuple[Config, nn.Module]:
    """Freeze, add what trains with the head, and find the batch size, if that is auto."""
    network = backbone.network
    freeze(network, head, backbone.stages, *_freezing(config))
    if config.network.dropout:
        add_dropout(network, head, config.network.dropout)
    if config.machine.sync_bn:
        network = convert_sync_batchnorm(network)
    if config.training.batch_size == "auto":
        precision = config.machine.settled_precision
        largest = largest_batch(network, spec.size, images, precision)
        config = config.replace(batch_size=largest)
    return config, network


def make_classifier(
    config: Config, backbone: Backbone, classes: tuple[str, ...], spec: InputSpec
) -> Classifier:
    weights, network, head = backbone.weights, backbone.network, backbone.head
    return Classifier(
        network=network,
        classes=classes,
        input_spec=spec,
        identity=backbone.identity,
        head=head,
        head_kind=config.network.head,
        stages=head_stages(network),
        weights_source=weights.source if weights else None,
        missing=weights.missing if weights else (),
        pretrained_hash=backbone_hash(network, head),
        pin=weights.pin if weights else None,
    )
