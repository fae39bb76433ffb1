"""How good a classifier is on labelled images that it was not trained on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from cnnft.config.choices import Split
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName, join
from cnnft.data.sources import Source
from cnnft.errors import CnnftError, UsageError
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import Inference, predict
from cnnft.inference.predictions import Predictions
from cnnft.metrics import (
    ClassScore,
    MacroScore,
    Score,
    calibration_error,
    class_scores,
    confusion_matrix,
    macro_average,
    top_k_accuracy,
)
from cnnft.runs.run import Run
from cnnft.runs.scores import Calibration


@dataclass(frozen=True)
class Evaluation:
    """Scores of one classifier on one set of images."""

    overall: Score
    top5: float | None
    """None for five classes or fewer."""
    calibration_error: float
    """Expected, of the probability that the predicted class is given."""
    classes: tuple[ClassScore, ...]
    confusion: list[list[int]]
    """Rows are true classes, columns predicted ones."""
    left_out: int = 0
    """Images that the classifier was trained on."""
    copies: int = 0
    """Of the evaluated images, those whose content is that of another one before."""
    contradictions: tuple[tuple[str, str], ...] = ()
    """Of the evaluated images: see `Samples`."""
    selected_on: int = 0
    """Of the evaluated images, those on which training chose its best epoch."""
    out_of_fold: bool = False
    """Whether the images were trained on, and each was predicted by a model of the other folds."""
    calibration: Calibration | None = None
    """What the classifier's temperature does to these images; None: it has none, or probabilities
    of several views were averaged."""
    skipped: tuple[Skipped, ...] = ()
    unrecognised: int = 0
    """Images of the model's training or validation that are not among those read, while most are:
    they are gone, or were changed and count as unseen."""

    @property
    def chance(self) -> float:
        """Accuracy of always answering the commonest class."""
        return max(row.n for row in self.classes) / self.overall.n

    @property
    def macro(self) -> MacroScore:
        return macro_average(self.classes)


def splits_to_evaluate(source: Source, split: Split) -> tuple[SplitName, ...]:
    """Which splits of a source are meant; where it separates none, all of it.

    Raises:
        UsageError: it has no such split.
    """
    if split == "all":
        return source.splits
    if split in source.splits:
        return (split,)
    if split == "val" and "train" in source.splits:  # finetune splits val off those images
        return ("train",)
    found = ", ".join(source.splits) if source.separated else "class folders only"
    raise UsageError(f"{source.name} has no {split} folder ({found}): choose another --split")


@dataclass(frozen=True)
class Seen:
    """What a model has seen before, by the SHA-256 of the images; nothing where none is known."""

    trained_on: frozenset[str] = frozenset()
    """They are left out: to score them would be a data leak."""
    selected_on: frozenset[str] = frozenset()
    """Training selected its best epoch on them; they are counted."""
    out_of_fold: Predictions | None = None
    """Of images that it was trained on."""

    @classmethod
    def by(cls, run: Run) -> "Seen":
        splits, predictions = run.dataset().splits, run.predictions()
        return cls(
            frozenset(splits["train"].hashes),
            frozenset(splits["val"].hashes),
            predictions if predictions and predictions.role == "out-of-fold" else None,
        )

    def missing(self, samples: Samples) -> int:
        """How many contents that it has seen are not there, though most of their split are."""
        known = self.trained_on, self.selected_on
        left = [(len(of), len(of.difference(samples.hashes))) for of in known]
        return sum(gone for n, gone in left if 2 * gone < n)


def evaluate(
    classifier: Classifier,
    dataset: Dataset,
    inference: Inference,
    seen: Seen,
    on_image: Callable[[int], object] = lambda total: None,
) -> Evaluation:
    """Evaluate on a dataset, read with the classifier's classes.

    Where it was trained on all of them, and they were predicted out of fold, that is evaluated.
    `on_image` is called with the number of images to evaluate, once for each that was.

    Raises:
        CnnftError: no image remains.
    """
    samples = join(list(dataset.splits.values()))
    own = None if len(samples.without(seen.trained_on)) else _out_of_fold(seen, samples)
    if own is not None:
        kept, predictions = own.samples, own
    else:
        kept = unseen(dataset, seen)
        predictions = predict(classifier, kept, inference, "test", lambda: on_image(len(kept)))
    averaged = inference.tta != "none" and own is None
    return replace(
        evaluation_of(predictions),
        calibration=None if averaged else _calibration(classifier.temperature, predictions),
        left_out=len(samples) - len(kept),
        copies=len(kept) - len(kept.once()),
        contradictions=tuple(kept.contradictions()),
        selected_on=sum(digest in seen.selected_on for digest in kept.hashes),
        out_of_fold=own is not None,
        skipped=dataset.skipped,
        unrecognised=seen.missing(samples),
    )


def _calibration(temperature: float, predictions: Predictions) -> Calibration | None:
    if temperature == 1:
        return None
    raw = replace(predictions, logits=predictions.logits * temperature)
    return Calibration.of(temperature, raw, predictions)


def _out_of_fold(seen: Seen, samples: Samples) -> Predictions | None:
    """Those that there are of these images; None: there are none."""
    hashes, predictions = set(samples.hashes), seen.out_of_fold
    rows = (
        [i for i, h in enumerate(predictions.samples.hashes) if h in hashes] if predictions else []
    )
    return predictions.take(rows) if predictions and rows else None


def evaluation_of(predictions: Predictions) -> Evaluation:
    log_probs, labels = predictions.log_probs, predictions.labels
    classes = predictions.samples.classes
    return Evaluation(
        overall=predictions.score(),
        top5=top_k_accuracy(log_probs, labels, 5) if len(classes) > 5 else None,
        calibration_error=calibration_error(log_probs, labels),
        classes=class_scores(log_probs, labels, classes),
        confusion=confusion_matrix(log_probs, labels).tolist(),
    )


def unseen(dataset: Dataset, seen: Seen) -> Samples:
    """The images of all splits but those that the model was trained on.

    Raises:
        CnnftError: no image remains.
    """
    samples = join(list(dataset.splits.values()))
    kept = samples.without(seen.trained_on)
    if len(kept):
        return kept
    where = f"{dataset.source} ({', '.join(dataset.splits)})"
    if len(samples):
        raise CnnftError(
            f"all {len(samples)} images of {where} were trained on: evaluate on images that the "
            "model has not seen"
        )
    raise CnnftError(f"{where} holds no readable image")
