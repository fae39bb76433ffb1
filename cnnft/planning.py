"""Everything that is settled before the first step: data, backbone, what trains and how fast."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm

from cnnft import data
from cnnft.acceleration import choose_precision, place
from cnnft.advice import Advice
from cnnft.augmentation import view_count
from cnnft.backbones import Backbone, open_backbone
from cnnft.batches import (
    BalancedDraw,
    KeyedBatches,
    channel_statistics,
    default_workers,
    keyed_seed,
)
from cnnft.classifier import Classifier, require_model
from cnnft.config import Config, Mode
from cnnft.data import OnFiles, Samples, Skipped
from cnnft.errors import CnnftError, UsageError
from cnnft.freezing import batchnorms, freeze, learning_statistics
from cnnft.heads import add_dropout, initialise, replace_by_mlp
from cnnft.inference import choose_device
from cnnft.memory import largest_batch
from cnnft.optim import (
    LearningRates,
    freezes_statistics,
    learning_rates,
    require_optimizer,
    state_per_weight,
)
from cnnft.pretrained import LoadedWeights, backbone_hash
from cnnft.probing import install, probe, takes_probe, wants_probe
from cnnft.run import Run
from cnnft.teaching import open_teachers
from cnnft.tensorboard import require_tensorboard
from cnnft.transforms import InputSpec
from cnnft.values import parse_statistics
from cnnft.zoo import local_folder, resolve

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first step; of a run nothing has been written yet."""

    config: Config
    """Settled: no mode auto any more."""
    asked: Mode
    train: Samples
    val: Samples
    skipped: tuple[Skipped, ...]
    leaked: int
    """Validation images left out because training has the same file."""
    classifier: Classifier
    stages: tuple[tuple[str, ...], ...]
    weights: LoadedWeights | None
    advice: Advice | None
    """What a probe of the frozen features says of the data, where there was one."""
    probed: bool
    """Whether the head starts from that probe."""
    teachers: tuple[Classifier, ...]
    rates: LearningRates
    batches: KeyedBatches
    device: torch.device
    workers: int

    @property
    def parameters(self) -> tuple[int, int]:
        """(trained, frozen)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.classifier.network.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return trained, sum(size for size, _ in sizes) - trained


def prepare(
    config: Config,
    *,
    restored: bool = False,
    on_files: OnFiles = lambda count, total: None,
) -> Plan:
    """Read the data, open the backbone, decide what trains and how fast.

    `restored`: all weights will be a checkpoint's, so the head is not probed again.

    Raises:
        CnnftError: what the user has to mend, in a sentence.
    """
    device = choose_device(config.device)
    _require_cuda_for_sync_bn(config, device)
    config = replace(config, precision=choose_precision(config.precision, device))
    for teacher in config.teacher:
        require_model(teacher)
    resolve(config.backbone)  # a wrong name is known before the data is read
    require_optimizer(config)
    if config.tensorboard:
        require_tensorboard()
    data.require_folder(config.data)
    asked, config = config.mode, _with_absolute_paths(config)
    workers = default_workers() if config.workers is None else config.workers
    found = _read(config, on_files)
    teachers = open_teachers(config, found.train.classes)
    _warn_of_known(config, found.val)
    backbone = _open(config, len(found.train.classes), device)
    spec = _input_spec(config, backbone.input_spec, found.train, workers)
    probed, starts_from_probe = None, False
    if config.mode == "auto" or (wants_probe(config) and not restored):
        probed = probe(config, backbone, spec, found.train, workers)
    elif wants_probe(config):  # the rates depend on whether there was one
        starts_from_probe = takes_probe(backbone, spec)
    if asked == "auto":
        assert probed is not None and probed.advice is not None
        config = replace(config, **probed.advice.cell.settings)
        if _auxiliary(config):
            backbone = _open(config, len(found.train.classes), device)
    network, head = backbone.network, _new_head(config, backbone)
    if probed is not None and probed.fitted is not None and wants_probe(config):
        install(network, head, probed.fitted)
        starts_from_probe = True
    if config.probe_first and not starts_from_probe:
        raise UsageError("--probe-first: this backbone's classifier is no single linear layer")
    freeze(network, head, backbone.stages, config.mode, config.train_stages)
    if config.dropout:
        add_dropout(network, head, config.dropout)
    if config.sync_bn:
        network = convert_sync_batchnorm(network)
    if config.batch_size == "auto":
        copies = 1 + state_per_weight(config) + bool(config.ema or config.swa)
        images, precision = len(found.train), config.settled_precision
        largest = largest_batch(network, spec.size, images, copies, precision)
        config = replace(config, batch_size=largest)
    keep = batchnorms(network, head) if freezes_statistics(config) else ()
    if config.recalibrate_bn and not restored and not learning_statistics(network, keep):
        raise UsageError(
            "--recalibrate-bn: no BatchNorm layer learns its statistics here; leave it out, or "
            "take --batchnorm train"
        )
    weights = backbone.weights
    return Plan(
        config=config,
        asked=asked,
        train=found.train,
        val=found.val,
        skipped=found.skipped,
        leaked=found.leaked,
        classifier=Classifier(
            network=network,
            classes=found.train.classes,
            input_spec=spec,
            identity=backbone.identity,
            head=head,
            head_kind=config.head,
            weights_source=weights.source if weights else None,
            missing=weights.missing if weights else (),
            pretrained_hash=backbone_hash(network, head),
            pin=weights.pin if weights else None,
        ),
        stages=backbone.stages,
        weights=weights,
        advice=probed.advice if probed else None,
        probed=starts_from_probe,
        teachers=teachers,
        rates=learning_rates(config, backbone.identity.architecture, starts_from_probe),
        batches=KeyedBatches(
            len(found.train),
            config.images_per_step,
            config.seed,
            config.epochs,
            draw=BalancedDraw(found.train.labels) if config.sampling == "balanced" else None,
            views=view_count(config),
        ),
        device=device,
        workers=workers,
    )


def _warn_of_known(config: Config, val: Samples) -> None:
    """A teacher that has learnt validation images may tell the student what is right there."""
    for teacher in config.teacher:
        if Path(teacher).is_dir():
            known = len(val) - len(data.without(val, Run.open(teacher).hashes("train")))
            if known:
                _log.warning(
                    "--teacher %s was trained on %d of the validation images: the score on val "
                    "may be optimistic",
                    *(teacher, known),
                )


def _require_cuda_for_sync_bn(config: Config, device: torch.device) -> None:
    if config.sync_bn and device.type != "cuda":
        raise UsageError(
            f"--sync-bn is for several GPUs, and this trains on {device}: leave it out"
        )


def _open(config: Config, classes: int, device: torch.device) -> Backbone:
    torch.manual_seed(keyed_seed("backbone", config.seed))  # where weights are random
    backbone = open_backbone(
        config.backbone,
        classes,
        pretrained=config.pretrained,
        weights=config.weights,
        image_size=config.image_size,
        auxiliary=_auxiliary(config),
        drop_path=config.drop_path,
    )
    place(backbone.network, device)
    return backbone


def _auxiliary(config: Config) -> bool:
    """Auxiliary classifiers train with the layers below them, or not at all."""
    return config.mode == "finetune" and config.train_stages is None


@dataclass(frozen=True)
class _Found:
    train: Samples
    val: Samples
    skipped: tuple[Skipped, ...]
    leaked: int


def _read(config: Config, on_files: OnFiles) -> _Found:
    """The checked images, those of val with none that train has too."""
    folder = data.require_folder(config.data)
    train, val = data.scan_training_data(folder, on_files)
    total = len(train) + (len(val) if val else 0)
    train = data.check(train, on_file=lambda: on_files(1, total))
    skipped, leaked = train.skipped, 0
    if val is not None:
        val = data.check(val, on_file=lambda: on_files(1, total))
        skipped += val.skipped
    _refuse_skipped(skipped, config.strict)
    if val is None:
        train, val = data.split(train, config.val_fraction, config.split_seed)
    else:
        with_leaks = len(val)
        val = data.without(val, train.hashes)
        leaked = with_leaks - len(val)
    _require_every_class(train, "train")
    if not len(val):
        raise CnnftError(f"{folder}: no readable validation image remains that is not in train too")
    return _Found(train, val, skipped, leaked)


def _refuse_skipped(skipped: tuple[Skipped, ...], strict: bool) -> None:
    if strict and skipped:
        first = skipped[0]
        raise CnnftError(
            f"{first.path} {first.reason} ({len(skipped)} such file(s)); without --strict they "
            "are skipped"
        )


def _require_every_class(samples: Samples, split: str) -> None:
    for name, count in zip(samples.classes, samples.counts(), strict=True):
        if count == 0:
            raise CnnftError(f"class {name} has no readable image in {split}")


def _new_head(config: Config, backbone: Backbone) -> frozenset[str]:
    """Give the backbone the head that is asked for, drawn by the seed alone; its tensors' names."""
    network, head = backbone.network, backbone.head
    device = next(network.parameters()).device
    network.cpu()  # each device draws numbers of its own
    if config.head == "mlp":
        head = replace_by_mlp(network, head)
    torch.manual_seed(keyed_seed("head", config.seed))
    initialise(network, head, config.head_init)
    network.to(device)
    return head


def _input_spec(config: Config, spec: InputSpec, samples: Samples, workers: int) -> InputSpec:
    """The backbone's, but for what the user asked to be otherwise."""
    spec = spec if config.fit is None else replace(spec, fit=config.fit)
    if config.normalize == "dataset":
        mean, std = channel_statistics(samples.paths, spec, config.images_at_once, workers)
        return replace(spec, mean=mean, std=std)
    if config.normalize != "pretrained":
        mean, std = parse_statistics(config.normalize)
        return replace(spec, mean=mean, std=std)
    return spec


def _with_absolute_paths(config: Config) -> Config:
    """So that the run can be read from another working directory."""
    # Not Path.resolve: a run is named after the link that the user gave, not after its target.
    data = Path(os.path.abspath(config.data))  # noqa: PTH100
    weights = None if config.weights is None else Path(config.weights).absolute()
    folder = local_folder(config.backbone) if config.backbone != "builtin" else None
    backbone = f"local-dir:{folder.absolute()}" if folder else config.backbone
    teachers = tuple(str(Path(teacher).absolute()) for teacher in config.teacher)
    return replace(config, data=data, weights=weights, backbone=backbone, teacher=teachers)
