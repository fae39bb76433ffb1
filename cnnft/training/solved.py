"""A run whose head is solved: logistic regression on the features of the frozen backbone."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cnnft.cache.features import FeatureExtractor, Features, evaluation_view_set
from cnnft.cache.pixels import CacheProgress
from cnnft.data.dataset import Samples
from cnnft.data.loading import ImageFiles
from cnnft.inference.classifier import Classifier
from cnnft.inference.predictions import Predictions
from cnnft.machine import distributed, interruption
from cnnft.metrics import score
from cnnft.models.surgery.embed import find_head
from cnnft.models.surgery.stagehead import UnitBlocks, stage_cut
from cnnft.probe.folds import assign_folds
from cnnft.probe.probe import install
from cnnft.probe.solve import PENALTIES, Solved, Trial, solve
from cnnft.runs.records import Penalty
from cnnft.runs.run import Run
from cnnft.runs.scores import Evidence, Metrics, TrainScore
from cnnft.training.events import Finished, Stopped
from cnnft.training.losses import balanced_weights
from cnnft.training.plan import Plan
from cnnft.training.selection import calibrated

_log = logging.getLogger(__name__)

_WORDS = {
    "last": "the features of the last layer",
    "stages": "the features of the last stages and the last layer",
}


@dataclass(frozen=True)
class Reading:
    """What a linear head reads of the frozen features."""

    name: str
    """last or stages."""
    classifier: Classifier
    """Its head is not fitted yet."""
    inputs: Callable[[Tensor], Tensor]
    """Features (N, D) -> what enters the linear layer."""


class Solving:
    """Solves the head of a plan, and writes the run.

    It has no state: a run that was interrupted begins again, with the features that are cached.
    The rows are the evaluation views of the training images and their mirror images; both are in
    one fold, and the score out of fold is of the former.
    """

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run = plan, run
        self.labels = torch.tensor(plan.train.labels)
        self.folds = assign_folds(plan.train, plan.config.freezing.folds)

    def events(self, stop: Callable[[], bool]) -> Iterator[CacheProgress | Finished | Stopped]:
        plan = self.plan
        extractor, readings = _readings(plan)
        plain = self._features(extractor, plan.train)
        mirrored = self._features(extractor, plan.train, mirrored=True)
        val = self._features(extractor, plan.val) if len(plan.val) else None
        parts = [part for part in (plain, mirrored, val) if part]
        done, total = 0, sum(len(part.missing) for part in parts)
        for part in parts:
            for count in part.compute():
                yield CacheProgress(done + count, total, "computing features of")
                if stop() and distributed.world_size == 1:  # of several all have to stop together
                    break
            if any(distributed.any_rank(stop())):
                yield Stopped(self.run, None)
                return
            done += len(part.missing)
        views = torch.stack([plain.values, mirrored.values])
        with interruption.waiting():
            solved = distributed.broadcast_from_main(lambda: self._solve(readings, views))
        self.views = views
        yield self._save(readings, solved, plain.values, val.values if val else None)

    def logits_without(self, train: Samples, val: Samples) -> Tensor:
        """(N, C) calibrated logits of `val`, which was held out: `train` alone is fitted.

        Both are among the images of the plan; what the head reads was chosen on all of them.
        """
        rows = {digest: row for row, digest in enumerate(self.plan.train.hashes)}
        kept = torch.tensor([rows[digest] for digest in train.hashes])
        inputs = torch.stack([self.reading.inputs(view[kept]) for view in self.views])
        weights = balanced_weights(train.counts()) if self.plan.config.balanced else None
        labels, classes = self.labels[kept], len(train.classes)
        solved = distributed.broadcast_from_main(
            lambda: solve(inputs, labels, classes, self.folds[kept], weights)
        )
        temperature = solved.chosen.calibration.temperature if solved.chosen else 1.0
        if self.val is None:
            held_out = self.views[0][[rows[digest] for digest in val.hashes]]
        else:
            held_out = self.val
        return (solved.linear(self.reading.inputs(held_out)) / temperature).float()

    def _features(
        self, extractor: FeatureExtractor, samples: Samples, mirrored: bool = False
    ) -> Features:
        plan = self.plan
        spec, data = plan.classifier.input_spec, Path(plan.config.dataset.data).name
        images = ImageFiles(samples.paths, crop=spec, read_timeout=plan.loading.read_timeout)
        about = f"{len(samples)} of {data} ({'mirror images' if mirrored else 'evaluation view'})"
        views = evaluation_view_set(samples, spec, images, plan.loading, about, mirrored)
        return Features(extractor, views, plan.config.machine.cache in ("auto", "disk"))

    def _solve(self, readings: Sequence[Reading], views: Tensor) -> list[Solved]:
        """One for each reading; `views` (V, N, D)."""
        train, folds = self.plan.train, self.folds
        weights = balanced_weights(train.counts()) if self.plan.config.balanced else None
        inputs = [torch.stack([r.inputs(view) for view in views]) for r in readings]
        return [solve(x, self.labels, len(train.classes), folds, weights) for x in inputs]

    def _save(
        self,
        readings: Sequence[Reading],
        solved: Sequence[Solved],
        train: Tensor,
        val: Tensor | None,
    ) -> Finished:
        """The head whose log-loss out of fold is lower; `train`, `val`: features (N, D)."""
        pairs = list(zip(readings, solved, strict=True))
        reading, found = min(pairs, key=lambda pair: _loss(pair[1]))
        self.reading, self.val, self.solved = reading, val, found
        classifier, chosen, run = reading.classifier, found.chosen, self.run
        install(classifier.network, classifier.head, found.linear)
        if chosen and chosen.penalty in (PENALTIES[0], PENALTIES[-1]):
            end = "strongest" if chosen.penalty == PENALTIES[0] else "weakest"
            _log.info(
                "the penalty that was chosen, %g, is the %s that is tried", chosen.penalty, end
            )
        temperature = chosen.calibration.temperature if chosen else 1.0
        self.classifier = replace(classifier, temperature=temperature)
        run.save_classifier(self.classifier)
        if val is not None:
            logits, evidence = found.linear(reading.inputs(val)).float(), Evidence.NOT_SELECTED
            predictions = Predictions(self.plan.val, logits, "val")
        else:
            assert chosen is not None
            predictions, evidence = self._out_of_fold(found, chosen), Evidence.OUT_OF_FOLD
        predictions, calibration = calibrated(predictions, temperature)
        run.save_predictions(predictions)
        run.save_penalties([row for r, s in pairs for row in _penalties(r, s, s is found)])
        logits = found.linear(reading.inputs(train)) / temperature
        fitted = score(logits.log_softmax(dim=1), self.labels)
        metrics = Metrics(
            f"logistic regression on {_WORDS[reading.name]}",
            best_epoch=None,
            train=TrainScore(fitted.n, fitted.loss, fitted.accuracy),
            val=predictions.score(),
            evidence=evidence,
            calibration=calibration,
        )
        run.save_metrics(metrics)
        return Finished(run, metrics)

    def _out_of_fold(self, solved: Solved, trial: Trial) -> Predictions:
        rows = solved.scored.tolist()
        folds = tuple(self.folds[solved.scored].tolist())
        return Predictions(self.plan.train.take(rows), trial.logits.float(), "out-of-fold", folds)


def _loss(solved: Solved) -> float:
    """Out of fold."""
    return math.inf if solved.chosen is None else solved.chosen.calibration.loss


def _penalties(reading: Reading, solved: Solved, installed: bool) -> Iterator[Penalty]:
    for trial in solved.trials:
        yield Penalty(
            features=reading.name,
            penalty=trial.penalty,
            n=len(trial.logits),
            accuracy=trial.accuracy,
            loss=trial.calibration.loss_before,
            temperature=trial.calibration.temperature,
            calibrated_loss=trial.calibration.loss,
            chosen=installed and trial is solved.chosen,
        )


def _readings(plan: Plan) -> tuple[FeatureExtractor, list[Reading]]:
    """The extractor of the features, and what each head that may be solved reads of them.

    Where one is on stages, the features are their blocks, and last what enters the other.
    """
    first, widest = plan.classifier, plan.staged or plan.classifier
    size = first.input_spec.size
    if widest.stages:
        cut = stage_cut(widest.network)
        unit = widest.network.get_submodule(cut.first)
        assert isinstance(unit, UnitBlocks)
        own = slice(-unit.widths[-1], None)
        readings = [Reading("last", first, lambda x: x[:, own])] if plan.staged else []
        readings.append(Reading("stages", widest, unit))
    else:
        place = find_head(first.network, first.head, size)
        assert place is not None
        cut, readings = place.cut, [Reading("last", first, lambda x: x)]
    extractor = FeatureExtractor(
        widest.network,
        cut,
        widest.identity,
        widest.pretrained_hash,
        pooled=True,
        rounding=(plan.loading.batch_size, torch.get_num_threads()),
    )
    return extractor.folded(size, widest.head), readings
