"""Pure functions of (log-probabilities, labels)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


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
    correct = int((log_probs.argmax(dim=1) == labels).sum())
    loss = float(torch.nn.functional.nll_loss(log_probs.double(), labels))
    return Score(len(labels), correct, loss)


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
    from torchmetrics.functional import classification as tm

    c = len(classes)
    precision, recall, f1 = (
        function(log_probs, labels, num_classes=c, average="none").tolist()
        for function in (tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score)
    )
    true = torch.bincount(labels, minlength=c).tolist()
    predicted = torch.bincount(log_probs.argmax(dim=1), minlength=c).tolist()
    return tuple(
        ClassScore(
            name=name,
            n=true[i],
            precision=precision[i] if predicted[i] else None,
            recall=recall[i] if true[i] else None,
            f1=f1[i] if predicted[i] + true[i] else None,
        )
        for i, name in enumerate(classes)
    )
