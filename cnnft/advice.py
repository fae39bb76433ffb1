"""How much to train: the size × similarity table of transfer learning, read with evidence."""

from dataclasses import dataclass

SMALL = 100
"""Images per class below which a dataset counts as small."""
SIMILAR = 0.8
"""Share of what chance leaves to be learned that a linear probe must learn on frozen features."""


@dataclass(frozen=True)
class Advice:
    """A cell of the table, what it means here, and on what evidence."""

    images_per_class: float
    probe_accuracy: float
    """Of a linear classifier on frozen features, in cross-validation over the training images."""
    chance: float
    """Share of the largest class."""
    small: bool
    similar: bool

    @property
    def learned(self) -> float:
        """What the probe learned of what chance leaves: 0 is chance, 1 is perfect."""
        return (self.probe_accuracy - self.chance) / max(1 - self.chance, 1e-9)


def advise(images_per_class: float, probe_accuracy: float, chance: float) -> Advice:
    """Place a dataset in the table.

    Similarity to the pretraining data is measured by what its features are worth as they are
    (Kornblith, Shlens and Le, 2019, relate the two).
    """
    learned = (probe_accuracy - chance) / max(1 - chance, 1e-9)
    return Advice(
        images_per_class, probe_accuracy, chance, images_per_class < SMALL, learned >= SIMILAR
    )
