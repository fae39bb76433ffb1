"""The scores of a run: metrics.json and comparison.json."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import IO, Any

from cnnft.inference.predictions import Predictions
from cnnft.machine.files import parse_json, to_json
from cnnft.metrics import Score, calibration_error
from cnnft.runs.records import record


@dataclass(frozen=True)
class TrainScore:
    """Of the best epoch, on training images as they were drawn and augmented; of a solved head, on
    those as evaluation sees them.
    """

    n: int
    loss: float | None
    """None: of a starting point, which no image was trained on."""
    accuracy: float | None


class Evidence(StrEnum):
    """What a score is worth."""

    SELECTED = "selected on val"
    NOT_SELECTED = "not selected on val"
    OUT_OF_FOLD = "out of fold"
    """A model of the other folds predicted each image; the penalty was selected on these folds."""


_NOTES = {
    Evidence.SELECTED: "selected on val, as the best of several, so optimistic",
    Evidence.NOT_SELECTED: "not selected on val",
    Evidence.OUT_OF_FOLD: "out of fold; the penalty was selected on these folds",
}


@dataclass(frozen=True)
class Comparison:
    """comparison.json: the head against a network that was trained, on the same n images of val.

    The head of the comparison was fitted without these images.
    """

    n: int
    head_loss: float
    """Mean log-loss, calibrated."""
    trained_loss: float
    difference: float
    """head_loss - trained_loss."""
    standard_error: float
    """Of the difference, over the images."""
    answer: str
    """head, trained or ensemble: what the run's classifier is."""


def comparison_from_json(file: IO[bytes]) -> Comparison:
    return record(Comparison, parse_json(file.read(), file.name))


@dataclass(frozen=True)
class Calibration:
    """What a temperature does: in metrics.json to the images that it was fitted on."""

    temperature: float
    loss_before: float
    """Mean log-loss with temperature 1."""
    ece_before: float
    ece: float
    """Expected calibration error, 0 to 1, of 15 bins of confidence."""

    @classmethod
    def of(cls, temperature: float, raw: Predictions, calibrated: Predictions) -> "Calibration":
        """Of predictions without the temperature, and with it."""
        ece, ece_before = (calibration_error(p.log_probs, p.labels) for p in (calibrated, raw))
        return cls(temperature, raw.score().loss, ece_before, ece)


@dataclass(frozen=True)
class Metrics:
    """metrics.json: which weights are the run's model, and its scores."""

    model: str
    """"best epoch 7", or an average or ensemble."""
    best_epoch: int | None
    """0: the starting point; None: there were no epochs."""
    train: TrainScore
    val: Score
    """Of the model on val, or out of fold."""
    evidence: Evidence = Evidence.SELECTED
    calibration: Calibration | None = None
    """None: its probabilities are as they were trained."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with what follows from them."""
        val = self.val
        return {
            "model": self.model,
            "best_epoch": self.best_epoch,
            "train": asdict(self.train),
            "val": {
                "note": _NOTES[self.evidence],
                "n": val.n,
                "correct": val.correct,
                "accuracy": val.accuracy,
                "interval95": val.interval,
                "macro_recall": val.macro_recall,
                "loss": val.loss,
            },
            "calibration": self.calibration and asdict(self.calibration),
        }


def metrics_to_json(metrics: Metrics) -> bytes:
    return to_json(metrics.to_dict())


def metrics_from_json(file: IO[bytes]) -> Metrics:
    values = parse_json(file.read(), file.name)
    calibration = values.get("calibration")
    scores = {
        "train": record(TrainScore, values["train"]),
        "val": record(Score, values["val"]),
        "evidence": {note: e for e, note in _NOTES.items()}[values["val"]["note"]],
        "calibration": calibration and record(Calibration, calibration),
    }
    return record(Metrics, values | scores)
