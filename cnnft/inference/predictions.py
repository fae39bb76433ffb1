"""`Predictions`: the logits of labelled images, each named by its content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cnnft.data.dataset import Samples
from cnnft.metrics import Score, score

Role = Literal["val", "test", "out-of-fold"]
"""What the images were to the model: it was selected on val; a model of the other folds, which has
not seen them, predicts those that are out of fold."""


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of N images; kept in runs, so that nothing computes it again."""

    samples: Samples
    logits: Tensor
    """(N, C), float32 or more, divided by the temperature of the classifier, where it has one; of
    several views or networks the log of their mean probability."""
    role: Role
    folds: tuple[int, ...] = ()
    """Of out-of-fold predictions, which fold each image was in."""

    def __post_init__(self) -> None:
        assert self.logits.shape == (len(self.samples), len(self.samples.classes))

    @property
    def labels(self) -> Tensor:
        """(N,)"""
        return torch.tensor(self.samples.labels, dtype=torch.long)

    @property
    def log_probs(self) -> Tensor:
        """(N, C)"""
        return self.logits.log_softmax(dim=1)

    @property
    def predicted(self) -> Tensor:
        """(N,): the class of the largest logit."""
        return self.logits.argmax(dim=1)

    def take(self, rows: Sequence[int]) -> "Predictions":
        """Of some of the images."""
        return Predictions(
            self.samples.take(rows),
            self.logits[list(rows)],
            self.role,
            tuple(self.folds[row] for row in rows) if self.folds else (),
        )

    def score(self) -> Score:
        return score(self.log_probs, self.labels)
