"""Hand-written statistics against their definitions and against scikit-like counting."""

import math

import pytest
import torch

from cnnft.metrics import (
    Z95,
    class_scores,
    confusion_matrix,
    score,
    top_k_accuracy,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 5), (5, 5), (1, 2), (37, 120), (950, 1000)])
def test_wilson_interval_inverts_the_score_test(correct, n):
    """Its ends are the proportions p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    p = correct / n
    for end in wilson_interval(correct, n):
        assert abs(p - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / n), abs=1e-9)
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= p <= high <= 1 and low < high


def test_wilson_interval_of_a_published_example():
    """81 of 263: 25.5 % to 36.6 % (Newcombe, 1998, table I, method 3)."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Seven classes, of which class 6 never occurs and class 5 is never predicted."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 7, generator=generator)
    logits[:, 5] -= 100
    labels = torch.randint(6, (60,), generator=generator)
    return logits.log_softmax(dim=1), labels


def test_score_counts_and_averages(case):
    log_probs, labels = case
    found = score(log_probs, labels)
    right = sum(int(row.argmax()) == int(y) for row, y in zip(log_probs, labels, strict=True))
    loss = -sum(float(row[y]) for row, y in zip(log_probs, labels, strict=True)) / 60
    assert (found.n, found.correct) == (60, right)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.accuracy == right / 60


def test_top_k_counts_ranks(case):
    log_probs, labels = case
    ranks = [
        sorted(row.tolist(), reverse=True).index(float(row[y]))
        for row, y in zip(*case, strict=True)
    ]
    for k in (1, 3, 5):
        assert top_k_accuracy(log_probs, labels, k) == pytest.approx(sum(r < k for r in ranks) / 60)


def test_confusion_and_class_scores_agree(case):
    log_probs, labels = case
    names = tuple("abcdefg")
    matrix = confusion_matrix(log_probs, labels)
    assert matrix[0, 1] == ((labels == 0) & (log_probs.argmax(dim=1) == 1)).sum()
    assert matrix.sum() == 60
    rows = class_scores(log_probs, labels, names)
    for i, row in enumerate(rows):
        hits = int(matrix[i, i])
        true, predicted = int(matrix[i].sum()), int(matrix[:, i].sum())
        assert (row.name, row.n) == (names[i], true)
        assert row.recall == (pytest.approx(hits / true) if true else None)
        assert row.precision == (pytest.approx(hits / predicted) if predicted else None)
        if true + predicted:
            assert row.f1 == pytest.approx(2 * hits / (true + predicted))
        else:
            assert row.f1 is None
    assert rows[6].recall is None and rows[5].precision is None
