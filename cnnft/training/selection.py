"""Which weights become the run's model: the start, the best epoch, an average or an ensemble."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cnnft.inference.predictions import Predictions
from cnnft.metrics import Score
from cnnft.probe.calibrate import calibrate
from cnnft.runs.records import Epoch, Metrics, TrainScore
from cnnft.training.losses import balanced_weights
from cnnft.training.plan import Plan


@dataclass(frozen=True)
class Validated:
    """What validation found: the scores of a network as it is, and what it is chosen by."""

    val: Score
    calibrated_loss: float


def validated(predictions: Predictions, balanced: bool) -> Validated:
    """`calibrated_loss` is the log-loss after temperature ("refine, then calibrate", Berta et al.,
    2025): how sure a network is can be mended after training, what it tells apart cannot.

    `balanced`: all classes weigh the same in it.
    """
    samples = predictions.samples
    weights = balanced_weights(samples.counts()) if balanced else None
    found = calibrate(predictions.logits, torch.tensor(samples.labels), weights)
    return Validated(predictions.score(), found.loss)


def best_epoch(history: Sequence[Epoch]) -> Epoch | None:
    """None: no epoch was better than the start."""
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def lowest_loss(start: Validated | None, history: Sequence[Epoch]) -> float:
    """Of the start and all epochs so far, after temperature; infinite where there are none."""
    if best := best_epoch(history):
        return best.val_calibrated_loss
    return math.inf if start is None else start.calibrated_loss


def metrics_of(plan: Plan, start: Validated | None, history: Sequence[Epoch]) -> Metrics:
    """The scores of the best epoch, or of the start."""
    n, best = len(plan.val), best_epoch(history)
    if best is None:
        assert start is not None
        train = TrainScore(len(plan.train), None, None)
        return Metrics(
            "no epoch was better than the starting point, a linear probe", 0, train, start.val
        )
    correct = round(best.val_accuracy * n)
    return Metrics(
        model=f"best epoch {best.epoch}",
        best_epoch=best.epoch,
        train=TrainScore(len(plan.train), best.train_loss, best.train_accuracy),
        val=Score(n, correct, best.val_macro_recall, best.val_loss),
    )
