"""Multinomial logistic regression on features, along a path of penalties, and cross-validated.

It minimises mean cross-entropy + penalty / 2 · ‖weight‖² by L-BFGS (Liu and Nocedal, 1989) in
double precision; the penalty is on the weights of standardised features.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cnnft.data.sampler import keyed_seed
from cnnft.inference.calibrate import Calibration, calibrate
from cnnft.machine.devices import in_one_thread

PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(4, -11, -1))
"""From the strongest on, so that each fit starts near its end (a warm start)."""
_PATIENCE = 3
"""Penalties that bring nothing before the search ends: the weakest take longest."""
_WITHOUT_EVIDENCE = 0.1
_MOST = 5000  # images that cross-validation looks at
_MOST_FITTED = 50_000
_SMALL = 10**7
"""Multiplications for the logits of all images, up to which they are computed in one thread."""
_LEAST_SPREAD = 0.01
"""Of the root mean square of the features' standard deviations: a feature that hardly varies in
training must not decide, because it may be large elsewhere. (The median would be 0 where most are
dead, as ReLU features of few images are.)"""
_JITTER = 1e-10


@dataclass(frozen=True)
class Linear:
    """logits = values @ weight.T + bias."""

    weight: Tensor
    """(C, D)"""
    bias: Tensor
    """(C,)"""

    def __call__(self, values: Tensor) -> Tensor:
        """(N, D) -> (N, C), float64."""
        return values.double() @ self.weight.double().T + self.bias.double()


@dataclass(frozen=True)
class Trial:
    """One penalty, tried in cross-validation."""

    penalty: float
    logits: Tensor
    """(n, C) of the images that are scored, out of fold."""
    accuracy: float
    calibration: Calibration
    """Of these logits: its log-loss chooses the penalty."""


@dataclass(frozen=True)
class Solved:
    """A linear classifier of the penalty that cross-validation chose, fitted on all images."""

    linear: Linear
    scored: Tensor
    """(n,): rows of the images that are scored out of fold."""
    trials: tuple[Trial, ...]
    """Empty where no image is scored."""

    @property
    def chosen(self) -> Trial | None:
        """The lowest log-loss; of equals the strongest penalty."""
        return min(self.trials, key=lambda trial: trial.calibration.loss, default=None)

    @property
    def temperature(self) -> float:
        """Out of fold; 1 where nothing was tried."""
        return self.chosen.calibration.temperature if self.chosen else 1.0

    @property
    def accuracy(self) -> float:
        """Out of fold; 0 where nothing was tried."""
        return self.chosen.accuracy if self.chosen else 0.0


def solve(
    values: Tensor,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    class_weights: Tensor | None = None,
) -> Solved:
    """Choose the penalty by the log-loss out of fold, after temperature, and fit all images.

    `values` (V, N, D) of V views, `labels` and `folds` (N,), `class_weights` (C,) of the loss. Of
    many images the penalty is chosen on some. It is a penalty on their mean loss, so for more
    images it is divided by how many times more they are.
    """
    few = _some(len(labels), _MOST)
    y, fold = labels[few], folds[few]
    rows = len(values) * len(few)
    small = rows * min(rows, values.shape[2]) * classes <= _SMALL
    with in_one_thread() if small else nullcontext():
        trials = tuple(cross_validate(values[:, few], y, classes, fold, class_weights))
        best = min(trials, key=lambda t: t.calibration.loss, default=None)
        penalty = _WITHOUT_EVIDENCE if best is None else best.penalty
        many = _some(len(labels), _MOST_FITTED)
        penalty *= len(few) / len(many)
        linear = fit(values[:, many], labels[many], classes, penalty, class_weights)
    return Solved(linear, few[can_be_scored(y, fold)], trials)


class Path:
    """The solutions on some images for one penalty after the other.

    With fewer images than features the weights lie in the span of the images, so the images'
    coordinates in it are all that counts: the rows of the Cholesky factor of their inner products.
    """

    def __init__(
        self, values: Tensor, labels: Tensor, classes: int, class_weights: Tensor | None = None
    ) -> None:
        """`values` (N, D), `labels` (N,), `class_weights` (C,) of the loss."""
        x = values.double()
        self.mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
        self.std = std.clamp(min=max(_LEAST_SPREAD * float(std.square().mean().sqrt()), 1e-8))
        self.x = x = (x - self.mean) / self.std
        self.labels = labels
        self.class_weights = None if class_weights is None else class_weights.to(x)
        self.factor: Tensor | None = None
        if len(x) < x.shape[1]:
            inner = x @ x.T
            inner.diagonal().add_(_JITTER * float(inner.diagonal().mean()) + 1e-300)
            self.factor = torch.linalg.cholesky(inner)
        width = x.shape[1] if self.factor is None else len(x)
        self.weight = torch.zeros(classes, width, dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)

    def fit(self, penalty: float) -> Linear:
        z = self.x if self.factor is None else self.factor
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias],
            max_iter=200,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = cross_entropy(
                z @ self.weight.T + self.bias, self.labels, self.class_weights, reduction="sum"
            )
            loss: Tensor = losses / len(z) + penalty / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            weight = self.weight
            if self.factor is not None:
                weight = (
                    torch.linalg.solve_triangular(self.factor, weight, upper=False, left=False)
                    @ self.x
                )
            weight = weight / self.std
            return Linear(weight.float(), (self.bias - weight @ self.mean).float())


def fit(
    values: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    class_weights: Tensor | None = None,
) -> Linear:
    """`values` (V, N, D) of V views, `labels` (N,), `class_weights` (C,) of the loss."""
    return Path(*_rows(values, labels), classes, class_weights).fit(penalty)


def cross_validate(
    values: Tensor,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    class_weights: Tensor | None = None,
) -> Iterator[Trial]:
    """Try penalties, the strongest first, until some in a row have brought nothing.

    `values` (V, N, D) of V views, all of which are trained on; the first is predicted. `folds`
    (N,). A class that the other folds lack is given the probability of one image among theirs.
    Nothing is tried where no class has images in two folds.
    """
    scored = can_be_scored(labels, folds)
    if not scored.any():
        return
    parts = [_Part(values, labels, folds == fold, class_weights) for fold in folds.unique()]
    best, waited = math.inf, 0
    for penalty in PENALTIES:
        logits = torch.empty(len(labels), classes, dtype=torch.float64)
        for part in parts:
            logits[part.held_out] = part.predict(penalty, classes)
        logits, true = logits[scored], labels[scored]
        accuracy = float((logits.argmax(dim=1) == true).double().mean())
        calibration = calibrate(logits, true)
        yield Trial(penalty, logits, accuracy, calibration)
        waited = 0 if calibration.loss < best else waited + 1
        best = min(best, calibration.loss)
        if waited == _PATIENCE:
            return


def can_be_scored(labels: Tensor, folds: Tensor) -> Tensor:
    """(N,) bool: the images whose class the other folds have; of others nothing could be learnt."""
    classes, places = labels.unique(return_inverse=True)
    numbers, fold = folds.unique(return_inverse=True)
    counts = torch.zeros(len(classes), len(numbers), dtype=torch.long)
    counts.index_put_((places, fold), torch.ones_like(places), accumulate=True)
    return (counts > 0).sum(dim=1)[places] > 1


class _Part:
    """The images of one fold, and the path on all others."""

    def __init__(
        self, values: Tensor, labels: Tensor, held_out: Tensor, class_weights: Tensor | None
    ) -> None:
        self.held_out, self.values = held_out, values[0, held_out]
        others = labels[~held_out]
        self.present, places = others.unique(return_inverse=True)
        self.least = -math.log(len(others))
        weights = None if class_weights is None else class_weights[self.present]
        rows = _rows(values[:, ~held_out], places)
        self.path = Path(*rows, len(self.present), weights)

    def predict(self, penalty: float, classes: int) -> Tensor:
        """(n, classes) of the images that are held out."""
        found = self.path.fit(penalty)(self.values)
        absent = found.logsumexp(dim=1, keepdim=True) + self.least
        logits = absent.expand(-1, classes).clone()
        logits[:, self.present] = found
        return logits


def _rows(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Views (V, N, D) as rows (V · N, D), each with its label."""
    return values.flatten(0, 1), labels.repeat(len(values))


def _some(n: int, most: int) -> Tensor:
    """(min(n, most),) of n rows, in order."""
    if n <= most:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(keyed_seed("some", n))
    return torch.randperm(n, generator=generator)[:most].sort().values
