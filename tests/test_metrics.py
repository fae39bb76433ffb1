"""Hand-written statistics against their definitions and against scikit-like counting."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

from cnnft.metrics import (
    Z95,
    calibration_error,
    class_scores,
    confusion_matrix,
    macro_average,
    mcnemar,
    score,
    tango_interval,
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


DISCORDANT = [(0, 0), (0, 1), (1, 0), (3, 3), (2, 16), (0, 12), (40, 20), (700, 640)]


@pytest.mark.parametrize(("only_a", "only_b"), DISCORDANT)
def test_mcnemar_is_the_binomial_test_on_discordant_images(only_a, only_b):
    n = only_a + only_b
    expected = binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def score_statistic(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Tango's, with the nuisance parameter found by maximising the likelihood."""

    def unlikelihood(share: float) -> float:
        counts = (only_a, only_b, n - only_a - only_b)
        shares = (share, share + difference, 1 - 2 * share - difference)
        return -sum(k * math.log(p) for k, p in zip(counts, shares, strict=True) if k)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    margin = 1e-12 * (bounds[1] - bounds[0])
    share = minimize_scalar(
        unlikelihood, bounds=(bounds[0] + margin, bounds[1] - margin), options={"xatol": 1e-12}
    ).x
    variance = 2 * share + difference - difference**2
    return (only_b - only_a - n * difference) / math.sqrt(n * variance)


@pytest.mark.parametrize(("only_a", "only_b"), DISCORDANT)
def test_tango_interval_inverts_the_score_test(only_a, only_b):
    n = only_a + only_b + 30
    low, high = tango_interval(only_a, only_b, n)
    assert -1 < low < (only_b - only_a) / n < high < 1
    for end in (low, high):
        found = abs(score_statistic(only_a, only_b, n, end))
        assert found == pytest.approx(Z95, abs=1e-3)
    assert tango_interval(only_b, only_a, n) == pytest.approx((-high, -low), abs=1e-12)


def test_tango_interval_at_its_limits():
    assert tango_interval(0, 9, 9)[1] == 1 and tango_interval(9, 0, 9)[0] == -1
    # Where all that is discordant points one way, it is Wilson's interval.
    assert tango_interval(0, 0, 20)[1] == pytest.approx(wilson_interval(0, 20)[1])


def test_tango_interval_of_a_published_example():
    """1 and 7 of 21: -0.517 to -0.026 (Fagerland et al., Statistics in Medicine 33, 2014)."""
    assert tango_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


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


def test_macro_averages_are_scikit_learns_over_the_classes_that_occur(case):
    log_probs, labels = case
    predicted = log_probs.argmax(dim=1)
    assert 6 in predicted  # said, though no image is of it: precision and F1 leave it out too
    found = macro_average(class_scores(log_probs, labels, tuple("abcdefg")))
    expected = precision_recall_fscore_support(
        labels, predicted, labels=range(6), average="macro", zero_division=0
    )
    assert (found.precision, found.recall, found.f1) == pytest.approx(expected[:3])
    assert found.recall == score(log_probs, labels).macro_recall
    with pytest.warns(UserWarning, match="not in y_true"):
        assert found.recall == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_calibration_error_of_an_example_by_hand():
    """Bins are 1/15 wide: 0.61 and 0.65 share one, 0.9 has one, and 1.0 the last."""
    confidence, right = torch.tensor([0.61, 0.65, 0.9, 1.0, 1.0]), [True, False, True, True, False]
    log_probs = torch.stack([confidence, 1 - confidence], dim=1).log()
    labels = torch.tensor([0 if correct else 1 for correct in right])
    expected = 2 / 5 * abs(0.5 - 0.63) + 1 / 5 * abs(1 - 0.9) + 2 / 5 * abs(0.5 - 1.0)
    assert calibration_error(log_probs, labels) == pytest.approx(expected, abs=1e-6)
    rounded = log_probs.clone()
    rounded[3:, 0] = 1e-7  # as a mean over views may be
    assert calibration_error(rounded, labels) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_that_of_torchmetrics():
    """Of probabilities that lie on no end of a bin, which it counts to the other side."""
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    labels = logits.softmax(dim=1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
    expected = multiclass_calibration_error(logits.softmax(dim=1), labels, 4, n_bins=15)
    found = calibration_error(logits.log_softmax(dim=1), labels)
    assert found == pytest.approx(float(expected), abs=1e-6)
