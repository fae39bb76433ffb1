"""Which weights become the run's model: the start, the best epoch, an average or an ensemble."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cnnft.inference.calibrate import calibrate
from cnnft.inference.predictions import Predictions
from cnnft.metrics import Score
from cnnft.runs.records import Epoch
from cnnft.runs.scores import Calibration
from cnnft.training.losses import balanced_weights


@dataclass(frozen=True)
class Validated:
    """What validation found: the scores of a network as it is, and what it is chosen by."""

    val: Score
    calibrated_loss: float
    temperature: float
    """Of all images alike, whatever they weigh in `calibrated_loss`."""


def validated(predictions: Predictions, balanced: bool) -> Validated:
    """`calibrated_loss` is the log-loss after temperature ("refine, then calibrate", Berta et al.,
    2025): how sure a network is can be mended after training, what it tells apart cannot.

    `balanced`: all classes weigh the same in it.
    """
    logits, labels = predictions.logits, predictions.labels
    natural = calibrate(logits, labels)
    weights = balanced_weights(predictions.samples.counts()) if balanced else None
    loss = calibrate(logits, labels, weights).loss if balanced else natural.loss
    return Validated(predictions.score(), loss, natural.temperature)


def calibrated(predictions: Predictions, temperature: float) -> tuple[Predictions, Calibration]:
    """(raw `predictions` with the temperature, what it does to them)."""
    after = replace(predictions, logits=predictions.logits / temperature)
    return after, Calibration.of(temperature, predictions, after)


def best_epoch(history: Sequence[Epoch]) -> Epoch | None:
    """None: no epoch was better than the start."""
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def lowest_loss(start: Validated | None, history: Sequence[Epoch]) -> float:
    """Of the start and all epochs so far, after temperature; infinite where there are none."""
    if best := best_epoch(history):
        return best.val_calibrated_loss
    return math.inf if start is None else start.calibrated_loss
