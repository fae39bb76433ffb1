"""One session of a run: from its checkpoint, or its beginning, to its model."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch
from torch import nn

from cnnft.cache.pixels import CacheProgress
from cnnft.data.augmentation import augmentation
from cnnft.errors import CnnftError, first_line
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import Inference, NotANumberError, collect, predict_batches
from cnnft.inference.predictions import Predictions
from cnnft.inference.storage import snapshot_ensemble
from cnnft.machine import distributed
from cnnft.machine.devices import Compiled
from cnnft.machine.interruption import Interrupted
from cnnft.metrics import Score
from cnnft.models.freezing import changing, learning_statistics
from cnnft.models.surgery.fold import folds
from cnnft.models.surgery.substitute import Substituted
from cnnft.runs.checkpoints import Checkpoint, Interval
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.runs.scores import Evidence, Metrics, TrainScore
from cnnft.runs.weights import weights_hash
from cnnft.training.averaging import recalibrate
from cnnft.training.begin import make_state
from cnnft.training.distillation import make_soft_targets
from cnnft.training.events import Finished, StartScored, Stopped
from cnnft.training.feed import Feed
from cnnft.training.losses import make_objective
from cnnft.training.plan import Plan
from cnnft.training.schedules import warmup_steps
from cnnft.training.selection import Validated, best_epoch, calibrated, lowest_loss, validated
from cnnft.training.step import EpochDone, StepDone, train
from cnnft.training.tensorboard import Board

_log = logging.getLogger(__name__)


class DivergedError(CnnftError):
    """Going on would only diverge again."""


class Session:
    """A run in training: its state, and what happens at the end of steps and epochs."""

    def __init__(self, plan: Plan, run: Run, board: Board) -> None:
        self.plan, self.run, self.board = plan, run, board
        self.start: Validated | None = None
        """Of a head that was fitted before: the first candidate."""
        self.history: list[Epoch] = []
        self.state = make_state(plan, self.history)
        self.best_is_lost = False
        if plan.checkpoint is not None:
            self._restore(plan.checkpoint)
        if plan.teachers and not self.over:
            classifier, parts = plan.classifier, plan.config.augmentation
            self.state.soft_targets = make_soft_targets(
                plan.teachers,
                classifier.input_spec,
                plan.train,
                Inference(
                    batch_size=plan.loading.batch_size,
                    workers=plan.loading.workers,
                    read_timeout=plan.loading.read_timeout,
                ),
                same_views=not (augmentation(parts).random or parts.mixes),
            )
        self.feed = Feed(plan)
        self.checkpoints = Interval(plan.config.run.checkpoint_every, self.state.step)

    def _restore(self, saved: Checkpoint) -> None:
        try:
            self.state.restore(saved.tensors, saved.values["state"])
            self._require_same_weights(saved)
            self.history.extend(Epoch(**row) for row in saved.values["history"])
            if start := saved.values["start"]:
                self.start = Validated(**start | {"val": Score(**start["val"])})
            best = saved.values["best_weights"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CnnftError(
                f"{self.run.path}: its checkpoint is of another cnnft or another network "
                f"({first_line(error)}): start a new run"
            ) from error
        self.run.require_classifier(of_an_epoch=bool(self.history or self.start))
        # Killed between the two, the run has weights of an epoch that the checkpoint does not know,
        # or no scores of those that it does.
        # That epoch comes again; on another machine it may be no better than the one before.
        self.best_is_lost = not self.over and not self.run.is_of(best)
        _log.info("going on after step %d of %d", self.state.step, len(self.plan.batches))

    def _require_same_weights(self, saved: Checkpoint) -> None:
        plan = self.plan
        for whose, before, now in (
            ("the backbone's", saved.values["pretrained"], plan.classifier.pretrained_hash),
            ("a teacher's", saved.values["teachers"], plan.teacher_hashes),
        ):
            if before != now:
                raise CnnftError(
                    f"{self.run.path} cannot go on: {whose} weights are others than when it "
                    "began; start a new run"
                )

    def events(
        self, stop: Callable[[], bool]
    ) -> Iterator[CacheProgress | StartScored | StepDone | Epoch | Finished | Stopped]:
        plan, state = self.plan, self.state
        if not self.over and (yield from self.feed.prepare(stop)):
            yield Stopped(self.run, state.step)
            return
        state.forward_module = self._forward_module()
        batches = self.feed.training(state.step)
        objective = make_objective(plan.config.loss, plan.train.counts())
        training = train(state, batches, objective, self.epochs_trained > len(self.history))
        try:
            if plan.head_is_fitted and not state.step and self.start is None:
                yield self._score_start()
            for event in () if self.over else training:
                if isinstance(event, StepDone):
                    yield event
                    if event.step % plan.batches.steps_per_epoch == 0:  # evaluated before all else
                        continue
                else:
                    yield self._end_epoch(event)
                if self.over:
                    break
                stopping, saving = distributed.any_rank(stop(), self.checkpoints.due(state.step))
                if stopping or saving:
                    self._save()
                if stopping:
                    yield Stopped(self.run, state.step)
                    return
        except Interrupted:  # while a batch was waited for, of training or of validation
            if distributed.world_size > 1:  # the others may be within a step
                raise
            self._save()
            yield Stopped(self.run, state.step)
            return
        yield self._finish()

    def _forward_module(self) -> nn.Module:
        """What computes the network's logits in training."""
        plan, state = self.plan, self.state
        network = self.feed.tail(state.network)
        if network is state.network:
            names = changing(network, state.keep_statistics)
            modules = folds(network, plan.classifier.input_spec.size, names)
            network = Substituted(network, modules) if modules else network
        return Compiled(network) if plan.config.machine.compile else network

    @property
    def over(self) -> bool:
        """After the last epoch, or the last of `patience` that brought nothing."""
        best, patience = best_epoch(self.history), self.plan.config.training.patience
        waited = len(self.history) - best.epoch if best else 0
        impatient = patience is not None and waited >= patience
        return impatient or len(self.history) == self.plan.config.training.epochs

    @property
    def epochs_trained(self) -> int:
        """Epochs whose steps are taken; the last one may have no row in the history yet."""
        return self.state.step // self.plan.batches.steps_per_epoch

    def _end_epoch(self, event: EpochDone) -> Epoch:
        run, plan, average = self.run, self.plan, self.state.average
        ema = plan.config.averaging.ema is not None
        model = average.module if average is not None and ema else self.state.network
        if plan.config.averaging.recalibrate_bn:
            self._recalibrate(model)
        predictions, found = self._validate(model)
        best = self.best_is_lost or found.calibrated_loss < lowest_loss(self.start, self.history)
        self.best_is_lost = False
        self.history.append(_row(event, found, self.state.optimizer, best))
        if best:
            temperature = found.temperature
            self._save_model(
                replace(plan.classifier, network=model, temperature=temperature), predictions
            )
        if cycle := self._finished_cycle():
            run.save_snapshot(cycle, model)
        run.save_history(self.history, plan.batches.steps_per_epoch)
        self.board.add(self.history[-1])
        self._save()
        return self.history[-1]

    def _score_start(self) -> StartScored:
        """The pretrained layers as they are with the probe as head: no epoch may be worse."""
        predictions, self.start = self._validate(self.state.network)
        classifier = replace(self.plan.classifier, temperature=self.start.temperature)
        self._save_model(classifier, predictions)
        return StartScored(self.start.val, self.start.calibrated_loss)

    def _save_model(
        self,
        classifier: Classifier,
        predictions: Predictions,
        what: str | None = None,
        evidence: Evidence = Evidence.SELECTED,
    ) -> None:
        """From now on the run's; `predictions` are raw. `what` it is, if not the best epoch."""
        self.run.save_classifier(classifier)
        predictions, calibration = calibrated(predictions, classifier.temperature)
        self.run.save_predictions(predictions)
        n, best = len(self.plan.train), best_epoch(self.history)
        if best is None:
            of, number = "the start, a linear probe: no epoch was better", 0
            train = TrainScore(n, None, None)
        else:
            of, number = f"best epoch {best.epoch}", best.epoch
            train = TrainScore(n, best.train_loss, best.train_accuracy)
        val = predictions.score()
        self.run.save_metrics(Metrics(what or of, number, train, val, evidence, calibration))

    def _finished_cycle(self) -> int | None:
        """The number of the cosine that ends here, from 1, where each gives a snapshot."""
        config, snapshots = self.plan.config, self.plan.config.averaging.snapshots
        if snapshots is None:
            return None
        warmup = warmup_steps(config.schedule, self.plan.length)
        steps = (len(self.plan.batches) - warmup) // snapshots
        cycle, rest = divmod(self.state.step - warmup, steps)
        return cycle if cycle > 0 and not rest else None

    def _save(self) -> None:
        tensors, state_values = self.state.state_dict()
        values = {
            "state": state_values,
            "start": self.start and asdict(self.start),
            "history": [asdict(epoch) for epoch in self.history],
            "frozen_statistics": self.plan.freezes_statistics,
            "head_is_fitted": self.plan.head_is_fitted,
            "pretrained": self.plan.classifier.pretrained_hash,
            "teachers": self.plan.teacher_hashes,
            "best_weights": weights_hash(self.run.path),
        }
        self.run.save_checkpoint(Checkpoint(self.state.step, tensors, values))
        self.checkpoints.saved(self.state.step)

    def _validate(self, network: nn.Module) -> tuple[Predictions, Validated]:
        val = self.plan.val
        try:
            batches = predict_batches(self.feed.tail(network), self.feed.validation)
            predictions = Predictions(val, collect(batches, val.paths), "val")
            if not math.isfinite(predictions.score().loss):
                raise NotANumberError("the loss on val is not finite")
        except NotANumberError as error:
            raise DivergedError(
                f"training diverged ({error}): lower --lr or --head-lr; the run keeps the best "
                "epoch before, if there was one"
            ) from error
        return predictions, validated(predictions, self.plan.config.balanced)

    def _finish(self) -> Finished:
        """The best epoch is the run's model, or an average or ensemble that is as good."""
        other = self._other_model()
        if other is None:
            return Finished(self.run, self.run.metrics())
        what, classifier = other
        predictions, found = self._validate(classifier.network)
        selected = not classifier.snapshots  # an ensemble becomes the model whatever its score
        lowest = lowest_loss(self.start, self.history)
        if selected and found.calibrated_loss > lowest:
            _log.warning(
                "%s has a log-loss of %.3f on val after temperature, the best epoch of %.3f: the "
                "run keeps the latter",
                *(what, found.calibrated_loss, lowest),
            )
            return Finished(self.run, self.run.metrics())
        classifier = replace(classifier, temperature=found.temperature)
        evidence = Evidence.SELECTED if selected else Evidence.NOT_SELECTED
        self._save_model(classifier, predictions, what, evidence)
        return Finished(self.run, self.run.metrics())

    def _other_model(self) -> tuple[str, Classifier] | None:
        """(what it is, the classifier) of an average or ensemble, where the settings have one."""
        config, classifier, average = self.plan.config, self.plan.classifier, self.state.average
        if number := config.averaging.snapshots:
            ensemble = replace(classifier, snapshots=number)
            network = snapshot_ensemble(ensemble, self.run.path)
            return f"the snapshot ensemble of {number}", replace(ensemble, network=network)
        if config.averaging.swa is None:
            return None
        assert average is not None
        what = f"the stochastic weight average of {config.averaging.swa} epoch(s)"
        self._recalibrate(average.module)
        return what, replace(classifier, network=average.module)

    def _recalibrate(self, network: nn.Module) -> None:
        """Make the BatchNorm statistics that are learned those of its present weights."""
        names = learning_statistics(self.state.network, self.state.keep_statistics)
        layers = [network.get_submodule(name) for name in names]
        recalibrate(self.feed.tail(network), layers, (pixels for pixels, _ in self.feed.first))


def _row(event: EpochDone, found: Validated, optimizer: torch.optim.Optimizer, best: bool) -> Epoch:
    # Of the backbone's groups the last stage's comes first.
    val = found.val
    rates = {group["name"]: group["lr"] for group in reversed(optimizer.param_groups)}
    return Epoch(
        epoch=event.epoch + 1,
        lr_backbone=rates.get("backbone", 0.0),
        lr_head=rates["head"],
        train_loss=event.loss,
        train_objective=event.objective,
        train_accuracy=event.accuracy,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        val_macro_recall=val.macro_recall,
        val_calibrated_loss=found.calibrated_loss,
        seconds=event.seconds,
        best=best,
    )
