"""finetune: a plan -> train -> save. Reads top to bottom."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.functional import cross_entropy

from cnnft.batches import TrainingImages, training_batches, view_batches
from cnnft.config import Config
from cnnft.errors import CnnftError
from cnnft.inference import NotANumberError, infer_all
from cnnft.metrics import Score, score
from cnnft.optim import freezes_statistics, make_optimizer, make_schedule
from cnnft.planning import Plan, prepare
from cnnft.run import Epoch, Run
from cnnft.training import EpochDone, StepDone, TrainState, train
from cnnft.transforms import EvaluationViews, training_transform


@dataclass(frozen=True)
class Finished:
    """The last event: the run holds the weights of the best epoch."""

    run: Run
    best: Epoch
    val: Score


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
