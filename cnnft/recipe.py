"""finetune: a plan -> train -> save. Reads top to bottom."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft.batches import TrainingImages, ViewLoader, training_batches, view_batches
from cnnft.checkpoints import Checkpoint
from cnnft.config import Config
from cnnft.environment import environment
from cnnft.errors import CnnftError
from cnnft.freezing import batchnorms
from cnnft.inference import NotANumberError, infer_all
from cnnft.metrics import Score, score
from cnnft.optim import freezes_statistics, make_optimizer, make_schedule
from cnnft.planning import Plan, prepare
from cnnft.run import Epoch, Run
from cnnft.training import EpochDone, StepDone, TrainState, train
from cnnft.transforms import EvaluationViews, training_transform


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


Event = Started | StepDone | Epoch | Finished | Stopped


def carry_out(
    plan: Plan, run: Run | None = None, *, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train as planned; yields at the start, after every step and validated epoch, at the end.

    The state is saved after every epoch, every `config.checkpoint_minutes`, and when `stop()` says
    so after a step. With `run` the training goes on from its newest checkpoint, and ends with the
    weights that it would have had without the interruption, bit for bit on the same device.

    Raises:
        CnnftError: the loss is not finite; a file cannot be read any more, or none be written.
    """
    config, classifier, spec = plan.config, plan.classifier, plan.classifier.input_spec
    saved = run.load_checkpoint() if run else None
    if run is None:
        run = Run.create(config, config.name or _default_name(config))
    run.save_config(config)
    run.save_data(plan.train, plan.val, plan.skipped)
    run.save_environment(environment(plan.device))
    yield Started(run)
    steps_per_epoch = plan.batches.steps_per_epoch
    optimizer = make_optimizer(classifier.network, classifier.head, plan.stages, plan.rates, config)
    state = TrainState(
        network=classifier.network,
        optimizer=optimizer,
        schedule=make_schedule(config, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        seed=config.seed,
        keep_statistics=(
            batchnorms(classifier.network, classifier.head) if freezes_statistics(config) else ()
        ),
    )
    history: list[Epoch] = []
    if saved:
        state.restore(saved.tensors, saved.step, saved.values["seen"])
        history = [Epoch(**row) for row in saved.values["history"]]
    training_images = TrainingImages(plan.train, training_transform(spec), config.seed)
    batches = training_batches(
        training_images, replace(plan.batches, first_step=state.step), plan.workers
    )
    val_batches = view_batches(
        plan.val.paths, EvaluationViews(spec), config.batch_size, plan.workers
    )

    def save() -> None:
        values = {"seen": state.seen, "history": [asdict(epoch) for epoch in history]}
        run.save_checkpoint(Checkpoint(state.step, state.tensors(), values))

    saved_at = time.monotonic()
    for event in train(state, batches, cross_entropy):
        if isinstance(event, StepDone):
            yield event
            if event.step % steps_per_epoch == 0:  # the epoch is evaluated before anything else
                continue
            if time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                save()
                saved_at = time.monotonic()
        else:
            val, log_probs = _validate(event, classifier.network, val_batches, plan, run)
            best = _best(history)
            better = best is None or _order(val.accuracy, val.loss) < _order(
                best.val_accuracy, best.val_loss
            )
            history.append(_row(event, val, optimizer, better))
            if better:
                run.save_classifier(classifier)
                run.save_val_predictions(plan.val, log_probs)
            run.save_history(history)
            run.save_metrics(_metrics(plan, history))
            save()
            saved_at = time.monotonic()
            yield history[-1]
        if stop() and state.step < len(plan.batches):
            save()
            yield Stopped(run, state.step)
            return
    best = _best(history)
    assert best is not None
    yield Finished(run, best, _score(plan, best))


def _best(history: Sequence[Epoch]) -> Epoch | None:
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def _order(accuracy: float, loss: float) -> tuple[float, float]:
    """Smaller is better: by accuracy, then by loss."""
    return -accuracy, loss


def _validate(
    event: EpochDone, network: nn.Module, batches: ViewLoader, plan: Plan, run: Run
) -> tuple[Score, Tensor]:
    try:
        log_probs = infer_all(network, batches, plan.val.paths)
        val = score(log_probs, torch.tensor(plan.val.labels))
        if not math.isfinite(event.loss + val.loss):
            raise NotANumberError("the loss is not finite")
    except NotANumberError as error:
        raise CnnftError(
            f"training diverged in epoch {event.epoch + 1} ({error}): lower --lr or "
            f"--head-lr; {run.path} keeps the best epoch before it, if there was one"
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
