"""Pure functions of (log-probabilities, labels)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""

CALIBRATION_BINS = 15
"""Of confidence, equally wide (Guo et al., 2017)."""


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927)."""
    p, z = correct / n, Z95
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(center - half, 0.0), min(center + half, 1.0)


@dataclass(frozen=True)
class Score:
    """How many of n images are classified right, and the mean loss."""

    n: int
    correct: int
    macro_recall: float
    """Mean over the classes that have images of the share that is right: balanced accuracy."""
    loss: float
    """Mean negative log-probability of the true class."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.n)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that two classifiers are equally often right (McNemar, 1947).

    `only_a` images are classified right by the first alone, `only_b` by the second alone: were
    both equally good, each of these would be either's with probability 1/2.
    """
    n, tail, ways = only_a + only_b, 0, 1
    for k in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # n choose k + 1
    return min(1.0, 2 * tail / 2**n)


def tango_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of the second's accuracy minus the first's, on the same n images.

    The differences that the score test does not reject (Tango, Statistics in Medicine 17, 1998).
    """

    def z(difference: float) -> float:
        b = (2 * n + only_a - only_b) * difference - only_a - only_b
        c = -only_a * difference * (1 - difference)
        share = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)  # likeliest of "the first alone"
        variance = n * (2 * share + difference * (1 - difference))
        return (only_b - only_a - n * difference) / math.sqrt(variance)

    def end(outside: float) -> float:
        inside = estimate
        for _ in range(60):  # halves the distance: to the last bit
            middle = (inside + outside) / 2
            if middle in (inside, outside):
                break
            inside, outside = (middle, outside) if abs(z(middle)) < Z95 else (inside, middle)
        return inside

    estimate = (only_b - only_a) / n
    return end(-1.0), end(1.0)


def score(log_probs: Tensor, labels: Tensor) -> Score:
    """`log_probs` (N, C), `labels` (N,)."""
    true, _, hits = _counts(log_probs, labels)
    recalls = [hit / n for hit, n in zip(hits, true, strict=True) if n]
    loss = float(torch.nn.functional.nll_loss(log_probs.double(), labels))
    return Score(len(labels), sum(hits), fmean(recalls), loss)


def _counts(log_probs: Tensor, labels: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Per class: images of it (support), predictions of it, and true positives."""
    predicted = log_probs.argmax(dim=1)
    parts = (labels, predicted, labels[predicted == labels])
    true, said, hits = (torch.bincount(p, minlength=log_probs.shape[1]).tolist() for p in parts)
    return true, said, hits


@dataclass(frozen=True)
class ClassScore:
    """One row of the per-class table; None where it is not defined (nothing to divide by)."""

    name: str
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


def top_k_accuracy(log_probs: Tensor, labels: Tensor, k: int) -> float:
    hits = (log_probs.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
    return float(hits.double().mean())


def confusion_matrix(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(C, C) counts: rows are true classes, columns predicted ones."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts: Tensor = multiclass_confusion_matrix(log_probs, labels, log_probs.shape[1])
    return counts


def class_scores(
    log_probs: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> tuple[ClassScore, ...]:
    return tuple(
        ClassScore(
            name=name,
            n=n,
            precision=hits / said if said else None,
            recall=hits / n if n else None,
            f1=2 * hits / (n + said) if n + said else None,
        )
        for name, n, said, hits in zip(classes, *_counts(log_probs, labels), strict=True)
    )


@dataclass(frozen=True)
class MacroScore:
    """Unweighted means over the classes that have images (macro average)."""

    precision: float
    """A class that is never predicted has 0."""
    recall: float
    f1: float


def macro_average(classes: Sequence[ClassScore]) -> MacroScore:
    present = [row for row in classes if row.n]
    return MacroScore(
        precision=fmean(row.precision or 0.0 for row in present),
        recall=fmean(row.recall or 0.0 for row in present),
        f1=fmean(row.f1 or 0.0 for row in present),
    )


def calibration_error(log_probs: Tensor, labels: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): |accuracy - mean confidence| over images of
    like confidence, averaged over all images.
    """
    confidence, predicted = log_probs.double().exp().max(dim=1)
    ends = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    excess = confidence - (predicted == labels).double()
    of_bins = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    of_bins.index_add_(0, torch.bucketize(confidence, ends[1:-1]), excess)
    return float(of_bins.abs().sum() / len(labels))
