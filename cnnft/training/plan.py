"""`Plan`: what is settled before the first step: data, network, what trains, how fast."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from cnnft.config.schema import Config
from cnnft.config.solving import solves_head
from cnnft.data.augmentation import augmentation
from cnnft.data.dataset import Dataset, Samples
from cnnft.data.folders import OnFiles
from cnnft.data.loading import Loading, forward_batch, worker_count
from cnnft.data.sampler import BalancedDraw, KeyedBatches
from cnnft.inference.classifier import Classifier
from cnnft.machine.devices import choose_device
from cnnft.models.freezing import freezes_statistics, learning_statistics
from cnnft.models.weights import LoadedWeights, backbone_hash
from cnnft.runs.checkpoints import Checkpoint
from cnnft.runs.run import Run
from cnnft.training.advice import Advice, advise_on
from cnnft.training.distillation import load_teachers
from cnnft.training.network import (
    install_probe,
    make_classifier,
    new_head,
    open_settled,
    probe_network,
    settle_features,
    settle_input,
    settle_network,
)
from cnnft.training.optim import LearningRates, Start, learning_rates
from cnnft.training.schedules import Length
from cnnft.training.settings import check_settings, settle_mode
from cnnft.training.splits import read, split, warn_of_known

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first step; of a run nothing has been written yet."""

    config: Config
    """Settled: no mode auto any more."""
    compares: bool
    """Whether the head may yield to a network that is trained too: mode auto."""
    dataset: Dataset
    """With train and val, which is empty where a head is solved on all images."""
    classifier: Classifier
    staged: Classifier | None
    """The same with a head on the last stages too, where the solver may choose that one."""
    stages: tuple[tuple[str, ...], ...]
    weights: LoadedWeights | None
    advice: Advice | None
    """What a probe of the frozen features says of the data, where there was one."""
    head_from: Literal["new", "probe", "checkpoint", "solver"]
    checkpoint: Checkpoint | None
    """Where training goes on from; None: it begins."""
    teachers: tuple[Classifier, ...]
    batches: KeyedBatches
    device: torch.device
    loading: Loading

    @property
    def asked(self) -> Config:
        """The settings that make the same plan again."""
        return self.config.replace(mode="auto") if self.compares else self.config

    @property
    def train(self) -> Samples:
        return self.dataset.splits["train"]

    @property
    def val(self) -> Samples:
        return self.dataset.splits["val"]

    @cached_property
    def teacher_hashes(self) -> list[str]:
        """SHA-256 of each teacher's weights: a resumed run learns from the same."""
        return [backbone_hash(teacher.network, frozenset()) for teacher in self.teachers]

    @property
    def length(self) -> Length:
        averaging = self.config.averaging
        return Length(
            self.config.training.epochs,
            self.batches.steps_per_epoch,
            averaging.swa or 0,
            averaging.snapshots or 0,
        )

    @cached_property
    def rates(self) -> LearningRates:
        head, parameters = self.classifier.head, self.classifier.network.named_parameters()
        trains = any(p.requires_grad for name, p in parameters if name not in head)
        pretrained = self.config.network.pretrained
        return learning_rates(
            self.config.optim,
            self.classifier.identity.architecture,
            min(self.config.training.images_per_step, len(self.train)),
            Start(
                "frozen" if not trains else "pretrained" if pretrained else "random",
                self.head_is_fitted,
                self.freezes_statistics and bool(learning_statistics(self.classifier.network)),
            ),
        )

    @property
    def parameters(self) -> tuple[int, int]:
        """(trained, frozen)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.classifier.network.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return trained, sum(size for size, _ in sizes) - trained

    @property
    def head_is_fitted(self) -> bool:
        """Whether the head started from a probe, before any checkpoint."""
        if self.checkpoint is not None:
            return bool(self.checkpoint.values["head_is_fitted"])
        return self.head_from == "probe"

    @property
    def freezes_statistics(self) -> bool:
        """As the run began, though the number of processes may be another now."""
        if self.checkpoint is not None:
            return bool(self.checkpoint.values["frozen_statistics"])
        return _freezes_statistics(self.config, len(self.train))


@torch.random.fork_rng(devices=[])  # the caller's generator stays as it is
def prepare(
    config: Config,
    run: Run | None = None,
    *,
    on_files: OnFiles = lambda count, total: None,
) -> Plan:
    """Read the data, open the backbone, decide what trains and how fast.

    With a `run` training goes on there: its images must be the same, wherever they lie now, and
    where it has a checkpoint all weights will be its, so the head is not fitted again.

    Raises:
        CnnftError: what the user has to mend, in a sentence.
    """
    device = choose_device(config.machine.device)
    auto, config = config.freezing.mode == "auto", settle_mode(check_settings(config, device))
    checkpoint = None if run is None else run.load_checkpoint()
    before = None if run is None else run.images()
    dataset = read(config, run, before, on_files)
    classes = dataset.classes
    teachers = load_teachers(config.loss.teacher, classes, config.machine.device)
    loading = _loading(config, device)
    config, backbone = open_settled(
        config, dataset, device, auto=auto, begun=checkpoint is not None
    )
    backbone, other = settle_features(config, backbone)
    dataset = split(config, dataset, run, before)
    train, val = dataset.splits["train"], dataset.splits["val"]
    warn_of_known(config.loss.teacher, val)
    spec = settle_input(config.input, backbone.input_spec, train, loading)
    probed = None if checkpoint else probe_network(config, backbone, spec, train, loading)
    advice = None if probed is None else advise_on(train, probed.solved.accuracy)
    head = new_head(config, backbone)
    fitted = install_probe(config, backbone, head, probed)
    config, network = settle_network(config, backbone, head, spec, len(train))
    return Plan(
        config=config,
        compares=auto and solves_head(config),
        dataset=dataset,
        classifier=make_classifier(
            config, replace(backbone, network=network, head=head), classes, spec
        ),
        staged=None if other is None else make_classifier(config, other, classes, spec),
        stages=backbone.stages,
        weights=backbone.weights,
        advice=advice,
        head_from=_head_from(config, checkpoint, fitted),
        checkpoint=checkpoint,
        teachers=teachers,
        batches=_batches(config, train),
        device=device,
        loading=loading,
    )


def _loading(config: Config, device: torch.device) -> Loading:
    return Loading(
        forward_batch(config.training),
        worker_count(config.machine.workers),
        pinned=device.type == "cuda",
        read_timeout=config.machine.read_timeout,
    )


def _head_from(
    config: Config, checkpoint: Checkpoint | None, fitted: bool
) -> Literal["new", "probe", "checkpoint", "solver"]:
    if checkpoint:
        return "checkpoint"
    if solves_head(config):
        return "solver"
    return "probe" if fitted else "new"


def _batches(config: Config, train: Samples) -> KeyedBatches:
    random = augmentation(config.augmentation).random
    return KeyedBatches(
        len(train),
        config.training.images_per_step,
        config.training.seed,
        config.training.epochs,
        draw=BalancedDraw(train.labels) if config.training.sampling == "balanced" else None,
        views=config.views if config.views is None or random else 1,
    )


# ---------------------------------------------------------------- BatchNorm statistics


def _freezes_statistics(config: Config, images: int) -> bool:
    seen = min(forward_batch(config.training), images)
    if config.machine.sync_bn:
        seen = min(config.training.images_per_step, images)
    return freezes_statistics(config.freezing.batchnorm, config.network.pretrained, seen)
