"""finetune: data -> model -> freeze -> train -> save. Reads top to bottom."""

import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cnnft import data
from cnnft.advice import Advice, advise
from cnnft.backbones import open_backbone
from cnnft.batches import (
    KeyedBatches,
    TrainingImages,
    channel_statistics,
    default_workers,
    keyed_seed,
    training_batches,
    view_batches,
)
from cnnft.classifier import Classifier
from cnnft.config import Config, Mode, parse_statistics
from cnnft.data import Samples, Skipped
from cnnft.errors import CnnftError, UsageError
from cnnft.features import embed, install, probe
from cnnft.freezing import freeze
from cnnft.heads import add_dropout, initialise, replace_by_mlp
from cnnft.inference import NotANumberError, choose_device, infer_all
from cnnft.metrics import Score, score
from cnnft.optim import (
    LearningRates,
    freezes_statistics,
    learning_rates,
    make_optimizer,
    make_schedule,
)
from cnnft.pretrained import LoadedWeights, backbone_hash
from cnnft.run import Epoch, Run
from cnnft.training import EpochDone, StepDone, TrainState, train
from cnnft.transforms import EvaluationViews, InputSpec, training_transform
from cnnft.zoo import local_folder, resolve


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first step; nothing has been written yet."""

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


@dataclass(frozen=True)
class Finished:
    """The last event: the run holds the weights of the best epoch."""

    run: Run
    best: Epoch
    val: Score


def prepare(config: Config, *, on_file: Callable[[int], object] = lambda total: None) -> Plan:
    """Read the data, open the backbone, decide what trains and how fast.

    `on_file` is called with the number of files, once for each file that was checked.

    Raises:
        CnnftError: what the user has to mend, in a sentence.
    """
    device = choose_device(config.device)
    identity = resolve(config.backbone)
    config = _with_absolute_paths(config)
    folder = data.require_folder(config.data)

    train_samples, val_samples = data.scan_training_data(folder)
    total = len(train_samples) + (len(val_samples) if val_samples else 0)
    train_samples, skipped = data.check(train_samples, on_file=lambda: on_file(total))
    if val_samples is None:
        _refuse_skipped(skipped, config.strict)
        train_samples, val_samples = data.split(
            train_samples, config.val_fraction, config.split_seed
        )
        leaked = 0
    else:
        val_samples, more = data.check(val_samples, on_file=lambda: on_file(total))
        skipped += more
        _refuse_skipped(skipped, config.strict)
        with_leaks = len(val_samples)
        val_samples = data.without(val_samples, train_samples.hashes)
        leaked = with_leaks - len(val_samples)
    _require_every_class(train_samples, "train")
    if not len(val_samples):
        raise CnnftError(f"{folder}: no readable validation image remains that is not in train too")

    classes = train_samples.classes
    backbone = open_backbone(
        config.backbone,
        len(classes),
        pretrained=config.pretrained,
        weights=config.weights,
        image_size=config.image_size,
        auxiliary=config.mode == "finetune" and config.train_stages is None,
    )
    network, head = backbone.network, backbone.head
    if config.head == "mlp":
        head = replace_by_mlp(network, head)
    torch.manual_seed(keyed_seed("head", config.seed))
    initialise(network, head, config.head_init)
    network.to(device)
    workers = default_workers() if config.workers is None else config.workers
    spec = _input_spec(config, backbone.input_spec, train_samples, workers)
    asked = config.mode
    config, advice = _probe(config, network, head, spec, train_samples, workers)
    freeze(network, head, backbone.stages, config.mode, config.train_stages)
    if config.dropout:
        add_dropout(network, head, config.dropout)
    return Plan(
        config=config,
        asked=asked,
        train=train_samples,
        val=val_samples,
        skipped=tuple(skipped),
        leaked=leaked,
        classifier=Classifier(
            network=network,
            classes=classes,
            input_spec=spec,
            identity=backbone.identity,
            head=head,
            head_kind=config.head,
            weights_source=backbone.weights.source if backbone.weights else None,
            missing=backbone.weights.missing if backbone.weights else (),
            pretrained_hash=backbone_hash(network, head),
        ),
        stages=backbone.stages,
        advice=advice,
        weights=backbone.weights,
        rates=learning_rates(config, identity.architecture),
        batches=KeyedBatches(len(train_samples), config.batch_size, config.seed, config.epochs),
        device=device,
        workers=workers,
    )


def carry_out(plan: Plan) -> Iterator[StepDone | Epoch | Finished]:
    """Train as planned; yields after every step, after every epoch with its validation, at the end.

    The run's files are up to date at every yield: whoever stops early keeps the best epoch so far.
    """
    config, classifier = plan.config, plan.classifier
    spec = classifier.input_spec
    run = Run.create(config, config.name or _default_name(config))
    run.save_data(plan.train, plan.val, plan.skipped)

    steps_per_epoch = plan.batches.steps_per_epoch
    optimizer = make_optimizer(classifier.network, classifier.head, plan.stages, plan.rates, config)
    state = TrainState(
        network=classifier.network,
        optimizer=optimizer,
        schedule=make_schedule(config, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        seed=config.seed,
        frozen_statistics=freezes_statistics(config),
    )
    training_images = TrainingImages(plan.train, training_transform(spec), config.seed)
    batches = training_batches(training_images, plan.batches, plan.workers)
    val_batches = view_batches(
        plan.val.paths, EvaluationViews(spec), config.batch_size, plan.workers
    )

    history: list[Epoch] = []
    best: tuple[Epoch, Score] | None = None
    for event in train(state, batches, cross_entropy):
        if isinstance(event, StepDone):
            yield event
            continue
        try:
            log_probs = infer_all(classifier.network, val_batches, plan.val.paths)
            val = score(log_probs, torch.tensor(plan.val.labels))
            if not math.isfinite(event.loss + val.loss):
                raise NotANumberError("the loss is not finite")
        except NotANumberError as error:
            raise CnnftError(
                f"training diverged in epoch {event.epoch + 1} ({error}): lower --lr or "
                f"--head-lr; {run.path} keeps the best epoch before it, if there was one"
            ) from error
        better = best is None or (-val.accuracy, val.loss) < (-best[1].accuracy, best[1].loss)
        epoch = _row(event, val, optimizer, better)
        history.append(epoch)
        if best is None or better:
            best = epoch, val
            run.save_classifier(classifier)
        run.save_history(history)
        run.save_metrics(_metrics(plan, best[0], best[1]))
        yield epoch
    assert best is not None
    yield Finished(run, *best)


P = ParamSpec("P")
R = TypeVar("R")


def _takes_arguments_of(
    source: Callable[P, object],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """For type checkers and help(): the decorated function has the parameters of `source`."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(source)  # type: ignore[attr-defined]
        return function

    return decorate


@_takes_arguments_of(Config)
def finetune(*args: Any, **kwargs: Any) -> Run:
    """Train a classifier on a folder of images, as the command of the same name does.

    Takes the fields of `Config`: finetune("photos", backbone="builtin", epochs=5). For progress,
    iterate over `carry_out(prepare(config))` instead.

    Raises:
        CnnftError: what has to be mended, in a sentence.
    """
    for event in carry_out(prepare(Config(*args, **kwargs))):
        finished = event
    assert isinstance(finished, Finished)
    return finished.run


def _input_spec(config: Config, spec: InputSpec, samples: Samples, workers: int) -> InputSpec:
    """The backbone's, but for what the user asked to be otherwise."""
    spec = spec if config.fit is None else replace(spec, fit=config.fit)
    if config.normalize == "dataset":
        mean, std = channel_statistics(samples.paths, spec, config.batch_size, workers)
        return replace(spec, mean=mean, std=std)
    if config.normalize != "pretrained":
        mean, std = parse_statistics(config.normalize)
        return replace(spec, mean=mean, std=std)
    return spec


def _probe(
    config: Config,
    network: nn.Module,
    head: frozenset[str],
    spec: InputSpec,
    samples: Samples,
    workers: int,
) -> tuple[Config, Advice | None]:
    """Fit a linear probe on frozen features if it is wanted, settle mode auto by it, and let it be
    the head if that is to start from it. Returns the settled config.
    """
    wanted = config.probe_first
    if wanted is None:
        wanted = config.pretrained and config.mode in ("finetune", "bn-only")
        wanted = wanted and config.head == "linear" and config.train_stages != 0
    if not wanted and config.mode != "auto":
        return replace(config, probe_first=False), None
    batches = view_batches(samples.paths, EvaluationViews(spec), config.batch_size, workers)
    features = embed(network, head, batches, samples.paths)
    labels = torch.tensor(samples.labels)
    fitted = probe(features.values, labels, len(samples.classes), config.seed)
    counts = samples.counts()
    advice = advise(len(samples) / len(counts), fitted.accuracy, max(counts) / len(samples))
    if config.mode == "auto":
        settings = advice.cell.settings
        config = replace(config, **settings)
        wanted = settings["probe_first"]
    if wanted and not features.linear:
        if config.probe_first:
            raise UsageError("--probe-first: this backbone's classifier is no single linear layer")
        wanted = False
    if wanted:
        install(network, head, fitted)
    return replace(config, probe_first=wanted), advice


def _with_absolute_paths(config: Config) -> Config:
    """So that the run can be read from another working directory."""
    # Not Path.resolve: a run is named after the link that the user gave, not after its target.
    data = Path(os.path.abspath(config.data))  # noqa: PTH100
    weights = None if config.weights is None else Path(config.weights).absolute()
    folder = local_folder(config.backbone) if config.backbone != "builtin" else None
    backbone = f"local-dir:{folder.absolute()}" if folder else config.backbone
    return replace(config, data=data, weights=weights, backbone=backbone)


def _refuse_skipped(skipped: list[Skipped], strict: bool) -> None:
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


def _default_name(config: Config) -> str:
    backbone = config.backbone.removeprefix("local-dir:").rstrip("/")
    return f"{Path(config.data).name}-{Path(backbone).name}"


def _row(event: EpochDone, val: Score, optimizer: torch.optim.Optimizer, best: bool) -> Epoch:
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    return Epoch(
        epoch=event.epoch + 1,
        lr_backbone=rates.get("backbone", 0.0),
        lr_head=rates["head"],
        train_loss=event.loss,
        train_accuracy=event.accuracy,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        seconds=event.seconds,
        best=best,
    )


def _metrics(plan: Plan, best: Epoch, val: Score) -> dict[str, Any]:
    return {
        "best_epoch": best.epoch,
        "train": {"n": len(plan.train), "loss": best.train_loss, "accuracy": best.train_accuracy},
        "val": {
            "note": "selected on val: the best of the epochs, so optimistic",
            "n": val.n,
            "correct": val.correct,
            "accuracy": val.accuracy,
            "interval95": val.interval,
            "loss": val.loss,
        },
    }
