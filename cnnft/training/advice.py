"""How much to train: the size × similarity table of transfer learning, read with evidence."""

from dataclasses import dataclass
from typing import Any

from cnnft.data.dataset import Samples

SMALL = 40
"""Images per class below which a dataset counts as small."""
SIMILAR = 0.7
"""Share of what chance leaves to be learned that a linear probe learns on similar data."""


@dataclass(frozen=True)
class Cell:
    """One of the table's four: what to do there, in words and as settings."""

    size: str
    similarity: str
    words: str
    settings: dict[str, Any]


TABLE = (
    Cell("small", "similar", "frozen backbone, new head", {"mode": "feature-extractor"}),
    Cell(
        "small",
        "different",
        "probe first, then train the last stage",
        {"mode": "finetune", "train_stages": 1},
    ),
    Cell("larger", "similar", "probe first, then train everything", {"mode": "finetune"}),
    Cell("larger", "different", "probe first, then train everything", {"mode": "finetune"}),
)


@dataclass(frozen=True)
class Advice:
    """The evidence that places a dataset in the table, and its cell.

    How similar it is to the pretraining data is measured by what the pretrained features are worth
    as they are: a linear probe's accuracy predicts what transfer learning gains (Kornblith, Shlens
    and Le, 2019).
    """

    images_per_class: float
    probe_accuracy: float
    """Of a linear classifier on frozen features, in cross-validation over the training images."""
    chance: float
    """Share of the largest class."""

    @property
    def learned(self) -> float:
        """What the probe learned of what chance leaves: 0 is chance, 1 is perfect."""
        left = 1 - self.chance
        return (self.probe_accuracy - self.chance) / left if left > 0 else 0.0

    @property
    def cell(self) -> Cell:
        size = "small" if self.images_per_class < SMALL else "larger"
        similarity = "similar" if self.learned >= SIMILAR else "different"
        return next(cell for cell in TABLE if (cell.size, cell.similarity) == (size, similarity))


def advise_on(train: Samples, probe_accuracy: float) -> Advice:
    """`Advice` on training images, of which each content counts once."""
    counts = train.once().counts()
    return Advice(sum(counts) / len(counts), probe_accuracy, max(counts) / sum(counts))
