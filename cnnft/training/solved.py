"""A run whose head is solved: logistic regression on the features of the frozen backbone."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cnnft.cache.features import FeatureExtractor, Features, compute_both
from cnnft.cache.pixels import CacheProgress
from cnnft.cache.views import evaluation_view_set
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


@dataclass(frozen=True)
class Found:
    """The head that was chosen, and the features that it was chosen on."""

    reading: Reading
    solved: Solved
    views: Tensor
    """(V, N, D) of the training images."""
    val: Tensor | None
    """(N, D)"""

    @property
    def classifier(self) -> Classifier:
        return replace(self.reading.classifier, temperature=self.solved.temperature)


class Solving:
    """Solves the head of a plan, and writes the run.

    Nothing is saved before: a run that was interrupted begins again, with the features that are
    cached.
    The rows are the evaluation views of the training images and their mirror images; both are in
    one fold, and the score out of fold is of the former.
    """

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run = plan, run
        self.labels = torch.tensor(plan.train.labels)
        self.folds = assign_folds(plan.train, plan.config.freezing.folds)
        self.found: Found | None = None

    def events(self, stop: Callable[[], bool]) -> Iterator[CacheProgress | Finished | Stopped]:
        plan = self.plan
        extractor, readings = _readings(plan)
        plain = self._features(extractor, plan.train)
        mirrored = self._features(extractor, plan.train, mirrored=True)
        val = self._features(extractor, plan.val) if len(plan.val) else None
        both = len(plain.missing) + len(mirrored.missing)
        parts = [(both, compute_both(plain, mirrored))]
        if val:
            parts.append((len(val.missing), val.compute()))
        done, total = 0, sum(missing for missing, _ in parts)
        for missing, counts in parts:
            for count in counts:
                yield CacheProgress(done + count, total, "computing features of")
                if stop() and distributed.world_size == 1:  # of several all have to stop together
                    break
            if any(distributed.any_rank(stop())):
                yield Stopped(self.run, None)
                return
            done += missing
        views = torch.stack([plain.values, mirrored.values])
        every = torch.arange(len(plan.train))
        with interruption.waiting():
            solved = [self._solve(reading, views, every) for reading in readings]
        pairs = list(zip(readings, solved, strict=True))
        best = min(pairs, key=lambda pair: _loss(pair[1]))
        self.found = Found(*best, views, val.values if val else None)
        yield self._save(self.found, pairs)

    def logits_without(self, train: Samples, val: Samples) -> Tensor:
        """(N, C) calibrated logits of `val`, which was held out: `train` alone is fitted.

        Both are among the images of the plan; what the head reads was chosen on all of them.
        """
        found = self.found
        assert found is not None
        rows = {digest: row for row, digest in enumerate(self.plan.train.hashes)}
        kept = torch.tensor([rows[digest] for digest in train.hashes])
        solved = self._solve(found.reading, found.views, kept)
        held_out = found.val
        if held_out is None:
            held_out = found.views[0][[rows[digest] for digest in val.hashes]]
        return (solved.linear(found.reading.inputs(held_out)) / solved.temperature).float()

    def _features(
        self, extractor: FeatureExtractor, samples: Samples, mirrored: bool = False
    ) -> Features:
        plan = self.plan
        spec, data = plan.classifier.input_spec, Path(plan.config.dataset.data).name
        images = ImageFiles(samples.paths, crop=spec, read_timeout=plan.loading.read_timeout)
        about = f"{len(samples)} of {data} ({'mirror images' if mirrored else 'evaluation view'})"
        views = evaluation_view_set(samples, spec, images, plan.loading, about, mirrored)
        return Features(extractor, views, plan.config.machine.cache in ("auto", "disk"))

    def _solve(self, reading: Reading, views: Tensor, rows: Tensor) -> Solved:
        """On these rows of the features `views` (V, N, D)."""
        train = self.plan.train
        weights = None
        if self.plan.config.balanced:
            weights = balanced_weights(train.take(rows.tolist()).counts())

        def on_main() -> Solved:
            inputs = torch.stack([reading.inputs(view[rows]) for view in views])
            labels, folds = self.labels[rows], self.folds[rows]
            return solve(inputs, labels, len(train.classes), folds, weights)

        return distributed.broadcast_from_main(on_main)

    def _save(self, found: Found, tried: Sequence[tuple[Reading, Solved]]) -> Finished:
        run, reading, solved = self.run, found.reading, found.solved
        chosen, temperature = solved.chosen, solved.temperature
        install(found.classifier.network, found.classifier.head, solved.linear)
        if chosen and chosen.penalty in (PENALTIES[0], PENALTIES[-1]):
            end = "strongest" if chosen.penalty == PENALTIES[0] else "weakest"
            _log.info("the chosen penalty, %g, is the %s that is tried", chosen.penalty, end)
        run.save_classifier(found.classifier)
        if found.val is not None:
            logits = solved.linear(reading.inputs(found.val)).float()
            raw, evidence = Predictions(self.plan.val, logits, "val"), Evidence.NOT_SELECTED
        else:
            assert chosen is not None
            raw, evidence = self._out_of_fold(solved, chosen), Evidence.OUT_OF_FOLD
        predictions, calibration = calibrated(raw, temperature)
        run.save_predictions(predictions)
        run.save_penalties([row for r, s in tried for row in _penalties(r, s, s is solved)])
        logits = solved.linear(reading.inputs(found.views[0])) / temperature
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
