"""One session of a run: from its checkpoint, or its beginning, to its model."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cnnft import distributed
from cnnft.acceleration import Compiled
from cnnft.augmentation import mixing
from cnnft.averaging import equal_average, recalibrate, running_average
from cnnft.batches import view_batches
from cnnft.checkpoints import Checkpoint
from cnnft.classifier import Classifier
from cnnft.config import Config
from cnnft.constraints import gradient_rules, weight_rules
from cnnft.errors import CnnftError, first_line
from cnnft.feeding import Feed
from cnnft.folding import folds
from cnnft.freezing import batchnorms, changing, learning_statistics
from cnnft.inference import NotANumberError, infer_all
from cnnft.metrics import Score, score
from cnnft.objectives import make_objective
from cnnft.optim import SMALL_BATCH, freezes_statistics, make_optimizer
from cnnft.pixelcache import Kept
from cnnft.planning import Plan
from cnnft.run import Epoch, Run
from cnnft.schedules import make_schedule
from cnnft.substitution import Substituted
from cnnft.teaching import make_teach
from cnnft.tensorboard import Board
from cnnft.training import EpochDone, StepDone, TrainState, train
from cnnft.transforms import EvaluationViews
from cnnft.values import parse_interval

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The last event: the run holds the model."""

    run: Run
    best: Epoch
    val: Score
    """Of the model, which chose it too."""
    model: str
    """Which one it is: "best epoch 7", or the average or vote that was asked for."""
    selected: bool = True
    """Whether it was chosen on val, so that its score is optimistic."""


@dataclass(frozen=True)
class Stopped:
    """The last event where the caller asked to stop: `resume` goes on after this step."""

    run: Run
    step: int


class DivergedError(CnnftError):
    """Going on would only diverge again."""


class Session:
    """A run in the making: what is kept between its steps, and what happens at their ends."""

    def __init__(self, plan: Plan, run: Run, saved: Checkpoint | None, board: Board) -> None:
        self.plan, self.run, self.board = plan, run, board
        self.history: list[Epoch] = []
        history = self.history  # for the schedule: with `self` in it, workers would outlive this
        config, classifier = plan.config, plan.classifier
        network, head, spec = classifier.network, classifier.head, classifier.input_spec
        # As the run began, though the number of processes may be another now.
        before = saved.values if saved else {}
        self.frozen = before.get("frozen_statistics", freezes_statistics(config))
        multiplier = make_schedule(config, plan.batches.steps_per_epoch)
        self.state = TrainState(
            network=network,
            optimizer=make_optimizer(network, head, plan.stages, plan.rates, config),
            schedule=lambda step: multiplier(step, [epoch.val_loss for epoch in history]),
            keys=plan.batches,
            keep_statistics=batchnorms(network, head) if self.frozen else (),
            mix=mixing(config, len(classifier.classes)),
            before_step=gradient_rules(network, config),
            after_step=weight_rules(network, head, config),
            micro_batch=config.micro_batch,
            precision=config.settled_precision,
            tolerated=config.skip_nonfinite,
        )
        self._average()
        if saved:
            self._restore(saved)
        if plan.teachers and not self.over:
            self.state.teach = make_teach(plan.teachers, config, spec, plan.train, plan.workers)
        self.feed = Feed(plan)
        self.due = _Due(config.checkpoint_every, self.state.step)

    def _average(self) -> None:
        config, per_epoch = self.plan.config, self.plan.batches.steps_per_epoch
        if config.ema is not None:
            self.state.average = running_average(self.state.network, config.ema)
        elif config.swa is not None:
            begin = (config.epochs - config.swa) * per_epoch
            self.state.average = equal_average(self.state.network)
            self.state.averaged = lambda step: step > begin and step % per_epoch == 0

    def _restore(self, saved: Checkpoint) -> None:
        try:
            self.state.restore(saved.tensors, saved.values["state"])
            if saved.values["pretrained"] != self.plan.classifier.pretrained_hash:
                raise ValueError("the backbone's weights are others than when it began")
            self.history.extend(Epoch(**row) for row in saved.values["history"])
            self.run.require_classifier(of_an_epoch=bool(self.history))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CnnftError(
                f"{self.run.path}: its checkpoint is of another cnnft or another network "
                f"({first_line(error)}): start a new run"
            ) from error
        _log.info("going on after step %d of %d", self.state.step, len(self.plan.batches))

    def events(
        self, stop: Callable[[], bool]
    ) -> Iterator[Kept | StepDone | Epoch | Finished | Stopped]:
        plan, state = self.plan, self.state
        if not self.over and (yield from self.feed.prepare(stop)):
            yield Stopped(self.run, state.step)
            return
        state.computing = self._computing()
        batches = self.feed.training(state.step)
        objective = make_objective(plan.config, plan.train.counts())
        for event in () if self.over else train(state, batches, objective):
            if isinstance(event, StepDone):
                yield event
                if event.step % plan.batches.steps_per_epoch == 0:  # evaluated before all else
                    continue
            else:
                yield self._end_epoch(event)
            if self.over:
                break
            stopping, saving = distributed.anywhere(stop(), self.due.at(state.step))
            if stopping or saving:
                self._save()
            if stopping:
                yield Stopped(self.run, state.step)
                return
        yield self._finish()

    def _computing(self) -> nn.Module:
        """What computes the network's logits in training."""
        plan, state = self.plan, self.state
        network = self.feed.tail(state.network)
        if network is state.network:
            names = changing(network, state.keep_statistics)
            modules = folds(network, plan.classifier.input_spec.size, names)
            network = Substituted(network, modules) if modules else network
        return Compiled(network) if plan.config.compile else network

    @property
    def over(self) -> bool:
        """After the last epoch, or the last of `patience` that brought nothing."""
        best, patience = _best(self.history), self.plan.config.patience
        waited = len(self.history) - best.epoch if best else 0
        impatient = patience is not None and waited >= patience
        return impatient or self.state.step == len(self.plan.batches)

    def _end_epoch(self, event: EpochDone) -> Epoch:
        run, plan, average = self.run, self.plan, self.state.average
        running = average is not None and plan.config.ema is not None
        model = average.module if average is not None and running else self.state.network
        val, log_probs = self._validate(model)
        best = _best(self.history)
        better = best is None or _is_better(val, _score(plan, best), plan.config)
        self.history.append(_row(event, val, self.state.optimizer, better))
        if better:
            run.save_classifier(replace(plan.classifier, network=model))
            run.save_val_predictions(plan.val, log_probs)
        if plan.config.snapshots is not None:
            warmup = round(plan.config.warmup_epochs * plan.batches.steps_per_epoch)
            steps = (len(plan.batches) - warmup) // plan.config.snapshots
            cycle, rest = divmod(self.state.step - warmup, steps)
            if cycle > 0 and not rest:
                run.save_snapshot(cycle, model)
        run.save_history(self.history, plan.batches.steps_per_epoch)
        run.save_metrics(_metrics(plan, self.history))
        self.board.add(self.history[-1])
        self._save()
        return self.history[-1]

    def _save(self) -> None:
        tensors, state_values = self.state.state_dict()
        values = {
            "state": state_values,
            "history": [asdict(epoch) for epoch in self.history],
            "frozen_statistics": self.frozen,
            "pretrained": self.plan.classifier.pretrained_hash,
        }
        self.run.save_checkpoint(Checkpoint(self.state.step, tensors, values))
        self.due.reset(self.state.step)

    def _validate(self, network: nn.Module) -> tuple[Score, Tensor]:
        try:
            tail = self.feed.tail(network)
            log_probs = infer_all(tail, self.feed.validation, self.plan.val.paths)
            val = score(log_probs, torch.tensor(self.plan.val.labels))
            if not math.isfinite(val.loss):
                raise NotANumberError("the loss on val is not finite")
        except NotANumberError as error:
            raise DivergedError(
                f"training diverged ({error}): lower --lr or --head-lr; the run keeps the best "
                "epoch before, if there was one"
            ) from error
        return val, log_probs

    def _finish(self) -> Finished:
        """The best epoch is the run's model, unless another was asked for that is as good."""
        plan, run, best = self.plan, self.run, _best(self.history)
        assert best is not None
        model, val = f"best epoch {best.epoch}", _score(plan, best)
        other = self._other_model()
        if other is None:
            return Finished(run, best, val, model)
        what, classifier = other
        other_val, log_probs = self._validate(classifier.network)
        if not classifier.snapshots and _is_better(val, other_val, plan.config):
            _log.warning(
                "%s has %.1f %% of val right, %s has %.1f %%: the run keeps the latter",
                *(what, 100 * _share_right(other_val, plan.config)),
                *(model, 100 * _share_right(val, plan.config)),
            )
            return Finished(run, best, val, model)
        if not classifier.snapshots:
            run.save_classifier(classifier)
        run.save_val_predictions(plan.val, log_probs)
        selected = not classifier.snapshots
        metrics = {"model": what, "val": _val(other_val, selected)}
        run.save_metrics(_metrics(plan, self.history) | metrics)
        return Finished(run, best, other_val, what, selected)

    def _other_model(self) -> tuple[str, Classifier] | None:
        """(what it is, the classifier) of the average or vote that was asked for."""
        config, classifier, average = self.plan.config, self.plan.classifier, self.state.average
        if config.snapshots is not None:
            what = f"the vote of {config.snapshots} snapshots"
            return what, self.run.save_vote(classifier, config.snapshots)
        layers = learning_statistics(classifier.network, self.state.keep_statistics)
        if config.swa is not None:
            assert average is not None
            what, network = f"the mean of the last {config.swa} epochs", average.module
        elif config.recalibrate_bn:
            what, network = "the best epoch with new BatchNorm statistics", classifier.network
            self.run.load_weights(network)
        else:
            return None
        views = EvaluationViews(classifier.input_spec)
        size, workers = max(config.images_at_once, SMALL_BATCH), self.plan.workers
        batches = view_batches(self.plan.train.paths, views, size, workers)
        recalibrate(network, [network.get_submodule(name) for name in layers], batches)
        return what, replace(classifier, network=network)


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


def _best(history: Sequence[Epoch]) -> Epoch | None:
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def _is_better(val: Score, other: Score, config: Config) -> bool:
    """More is right, or as much with a lower loss."""
    return (-_share_right(val, config), val.loss) < (-_share_right(other, config), other.loss)


def _share_right(val: Score, config: Config) -> float:
    """Of the images, or where training makes all classes count alike the mean over the classes."""
    return val.macro_recall if config.balanced else val.accuracy


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
        val_macro_recall=val.macro_recall,
        seconds=event.seconds,
        best=best,
    )


def _score(plan: Plan, epoch: Epoch) -> Score:
    n = len(plan.val)
    return Score(n, round(epoch.val_accuracy * n), epoch.val_macro_recall, epoch.val_loss)


def _metrics(plan: Plan, history: Sequence[Epoch]) -> dict[str, Any]:
    best = _best(history)
    assert best is not None
    return {
        "model": f"best epoch {best.epoch}",
        "best_epoch": best.epoch,
        "train": {"n": len(plan.train), "loss": best.train_loss, "accuracy": best.train_accuracy},
        "val": _val(_score(plan, best)),
    }


def _val(val: Score, selected: bool = True) -> dict[str, Any]:
    note = "selected on val, as the best of several, so optimistic"
    return {
        "note": note if selected else "not selected on val",
        "n": val.n,
        "correct": val.correct,
        "accuracy": val.accuracy,
        "interval95": val.interval,
        "macro_recall": val.macro_recall,
        "loss": val.loss,
    }
