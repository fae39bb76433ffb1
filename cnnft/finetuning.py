"""finetune: a plan -> train -> save. Reads top to bottom."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import distributed
from cnnft.augmentation import augmentation, mixing, training_transform
from cnnft.batches import (
    ImageFiles,
    TrainingImages,
    ViewLoader,
    training_batches,
    view_batches,
)
from cnnft.checkpoints import Checkpoint
from cnnft.config import Config
from cnnft.environment import environment
from cnnft.errors import CnnftError, first_line
from cnnft.freezing import batchnorms
from cnnft.inference import NotANumberError, infer_all
from cnnft.metrics import Score, score
from cnnft.optim import freezes_statistics, make_optimizer
from cnnft.pixelcache import Kept, KeptImages, keep, training_pixels
from cnnft.planning import Plan, prepare
from cnnft.run import Epoch, Run
from cnnft.schedules import make_schedule
from cnnft.training import EpochDone, NonFiniteLossError, StepDone, TrainState, train
from cnnft.transforms import EvaluationViews
from cnnft.values import parse_interval

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """The first event: the run's directory is there."""

    run: Run


@dataclass(frozen=True)
class Finished:
    """The last event: the run holds the weights of the best epoch."""

    run: Run
    best: Epoch
    val: Score


@dataclass(frozen=True)
class Stopped:
    """The last event where the caller asked to stop: `resume` goes on after this step."""

    run: Run
    step: int


Event = Started | Kept | StepDone | Epoch | Finished | Stopped

_FILES_SHOWN = 3


def carry_out(
    plan: Plan, run: Run | None = None, *, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train as planned; yields at the start, after every step and validated epoch, at the end.

    Before the first step it may yield `Kept` images: decoded, for all epochs to read.

    The state is saved after every epoch, at every `config.checkpoint_every`, and when `stop()` says
    so after a step. With `run` the training goes on from its newest checkpoint, and ends with the
    weights that it would have had without the interruption, bit for bit on the same device.
    Several processes each call it; the main one writes.

    Raises:
        CnnftError: the loss is not finite; a file cannot be read any more, or none be written.
    """
    resuming, name = run is not None, plan.config.name or _default_name(plan.config)
    with run.locked() if run else Run.create(plan.config, name) as run:
        run.save_config(plan.config)
        run.save_data(plan.train, plan.val, plan.skipped)
        run.save_environment(environment(plan.device))
        yield Started(run)
        saved = run.load_checkpoint() if resuming else None
        yield from _explained(_train(plan, run, saved, stop), plan)


def _train(
    plan: Plan, run: Run, saved: Checkpoint | None, stop: Callable[[], bool]
) -> Iterator[Event]:
    config, classifier, spec = plan.config, plan.classifier, plan.classifier.input_spec
    history: list[Epoch] = []
    multiplier = make_schedule(config, plan.batches.steps_per_epoch)
    # As the run began, though the number of processes may be another now.
    before = saved.values if saved else {}
    frozen = before.get("frozen_statistics", freezes_statistics(config))
    state = TrainState(
        network=classifier.network,
        optimizer=make_optimizer(
            classifier.network, classifier.head, plan.stages, plan.rates, config
        ),
        schedule=lambda step: multiplier(step, [epoch.val_loss for epoch in history]),
        keys=plan.batches,
        keep_statistics=batchnorms(classifier.network, classifier.head) if frozen else (),
        mix=mixing(config, len(classifier.classes)),
        micro_batch=config.micro_batch,
        tolerated=config.skip_nonfinite,
    )
    if saved:
        try:
            state.restore(saved.tensors, saved.values["state"])
            history.extend(Epoch(**row) for row in saved.values["history"])
            run.require_classifier(of_an_epoch=bool(history))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CnnftError(
                f"{run.path}: its checkpoint is of another cnnft or another network "
                f"({first_line(error)}): start a new run"
            ) from error
    images, val_images = _images(plan)
    with closing(keep([images, val_images], config.cache, config.epochs)) as keeping:
        for kept in keeping:
            yield kept
            if stop():
                break
    if any(distributed.anywhere(stop())):
        yield Stopped(run, state.step)
        return
    transform, pinned = training_transform(spec, augmentation(config)), plan.device.type == "cuda"
    batches = training_batches(
        TrainingImages(plan.train, transform, config.seed, images),
        replace(plan.batches, first_step=state.step),
        plan.workers,
        pinned=pinned,
    )
    val_batches = view_batches(
        plan.val.paths,
        EvaluationViews(spec).of_crop,
        config.images_at_once,
        plan.workers,
        val_images,
        pinned=pinned,
    )
    due = _Due(config.checkpoint_every, state.step)
    if saved:
        _log.info("going on after step %d of %d", state.step, len(plan.batches))

    def save() -> None:
        tensors, state_values = state.state_dict()
        values = {
            "state": state_values,
            "history": [asdict(epoch) for epoch in history],
            "frozen_statistics": frozen,
        }
        run.save_checkpoint(Checkpoint(state.step, tensors, values))
        due.reset(state.step)

    for event in train(state, batches, partial(cross_entropy, reduction="sum")):
        if isinstance(event, StepDone):
            yield event
            if event.step % plan.batches.steps_per_epoch == 0:  # evaluated before anything else
                continue
        else:
            val, log_probs = _validate(classifier.network, val_batches, plan)
            best = _best(history)
            better = best is None or (-val.accuracy, val.loss) < (
                -best.val_accuracy,
                best.val_loss,
            )
            history.append(_row(event, val, state.optimizer, better))
            if better:
                run.save_classifier(classifier)
                run.save_val_predictions(plan.val, log_probs)
            run.save_history(history)
            run.save_metrics(_metrics(plan, history))
            save()
            yield history[-1]
        stopping, saving = distributed.anywhere(stop(), due.at(state.step))
        stopping = stopping and state.step < len(plan.batches)
        if stopping or saving:
            save()
        if stopping:
            yield Stopped(run, state.step)
            return
    best = _best(history)
    assert best is not None
    yield Finished(run, best, _score(plan, best))


def _images(plan: Plan) -> tuple[KeptImages, KeptImages]:
    """What training reads of its images, and evaluation's crops of the validation images."""
    spec, of = plan.classifier.input_spec, Path(plan.config.data).name
    pixels = training_pixels(plan.config, spec)
    files = ImageFiles(plan.train.paths, pixels)
    crops = ImageFiles(plan.val.paths, crop=spec)
    return (
        KeptImages(files, plan.train.hashes, f"{len(files.paths)} training images of {of}"),
        KeptImages(crops, plan.val.hashes, f"{len(crops.paths)} validation crops of {of}"),
    )


class _Due:
    """Whether the next checkpoint is due."""

    def __init__(self, every: str, step: int) -> None:
        self.seconds, self.steps = parse_interval(every)
        self.reset(step)

    def reset(self, step: int) -> None:
        self.step, self.time = step, time.monotonic()

    def at(self, step: int) -> bool:
        long = time.monotonic() - self.time >= self.seconds
        return long or step - self.step >= self.steps


class DivergedError(CnnftError):
    """Going on would only diverge again."""


def _explained(events: Iterator[Event], plan: Plan) -> Iterator[Event]:
    """`events`; what stops them is told with the images it is about, and the likely cause."""
    try:
        yield from events
    except NonFiniteLossError as error:
        if error.step == 0:
            cause = "at the first step the weights, or --normalize, are to blame"
        else:
            cause = "most often a learning rate is too high: lower --lr or --head-lr"
        files = [plan.train.paths[index] for index in plan.batches.at(error.step)]
        shown = ", ".join(files[:_FILES_SHOWN]) + (", …" if len(files) > _FILES_SHOWN else "")
        _log.debug("images of step %d: %s", error.step + 1, ", ".join(files))
        raise DivergedError(
            f"{error}: {cause}; its images: {shown} (with --skip-nonfinite N, also beside "
            "--resume, up to N such steps are left out)"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CnnftError(
            "BatchNorm cannot train on a single image of this size: raise --batch-size or "
            "--image-size, use fewer processes, or --batchnorm frozen"
        ) from error


def _best(history: Sequence[Epoch]) -> Epoch | None:
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def _validate(network: nn.Module, batches: ViewLoader, plan: Plan) -> tuple[Score, Tensor]:
    try:
        log_probs = infer_all(network, batches, plan.val.paths)
        val = score(log_probs, torch.tensor(plan.val.labels))
        if not math.isfinite(val.loss):
            raise NotANumberError("the loss on val is not finite")
    except NotANumberError as error:
        raise DivergedError(
            f"training diverged ({error}): lower --lr or --head-lr; the run keeps the best epoch "
            "before, if there was one"
        ) from error
    return val, log_probs


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


def _default_name(config: Config) -> str:
    backbone = config.backbone.removeprefix("local-dir:").rstrip("/")
    return f"{Path(config.data).name}-{Path(backbone).name}"


def _row(event: EpochDone, val: Score, optimizer: torch.optim.Optimizer, best: bool) -> Epoch:
    # Of the backbone's groups the last stage's comes first.
    rates = {group["name"]: group["lr"] for group in reversed(optimizer.param_groups)}
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


def _score(plan: Plan, epoch: Epoch) -> Score:
    n = len(plan.val)
    return Score(n, round(epoch.val_accuracy * n), epoch.val_loss)


def _metrics(plan: Plan, history: Sequence[Epoch]) -> dict[str, Any]:
    best = _best(history)
    assert best is not None
    val = _score(plan, best)
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
