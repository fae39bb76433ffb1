"""What a temperature from few images costs, with priors of several widths; writes the table.

    python -m research.temperature

Logits of a classifier that is calibrated at a known temperature are simulated; a temperature is
fitted to some images, and its log-loss on others is compared with the known one's.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.document import fill

DOCUMENT = Path(__file__).parents[1] / "docs/how-much-to-train.md"
IMAGES = (10, 20, 50, 100, 200)
SPREADS = (None, 0.25, 0.5, 1.0)
"""About the standard deviation of log T before any image is seen; None: no prior."""
CLASSES = ((2, 3.0), (5, 3.0), (10, 4.0))
"""How many there are, and the standard deviation of their logits."""
TEMPERATURES = (0.7, 1.0, 1.5, 2.5)
OTHERS = 4000
"""Images that the log-loss is measured on."""
REPEATS = 60
GRID = np.geomspace(1 / 20, 20, 241)

Numbers = NDArray[np.float64]


def losses(logits: Numbers, labels: NDArray[np.int64]) -> Numbers:
    """(G, N): of each image at each temperature of the grid."""
    scaled = logits / GRID[:, None, None]
    scaled -= scaled.max(axis=2, keepdims=True)
    log_sums = np.log(np.exp(scaled).sum(axis=2))
    found: Numbers = log_sums - scaled[:, np.arange(len(labels)), labels]
    return found


def costs(images: int, random: np.random.Generator) -> list[float]:
    """Nats beside the best temperature: without calibration, then with each prior."""
    priors = [0 * GRID if s is None else (1 / GRID - 1 + np.log(GRID)) / s**2 for s in SPREADS]
    one = int(np.abs(np.log(GRID)).argmin())
    found = []
    for classes, scale in CLASSES:
        for temperature in TEMPERATURES:
            logits = random.normal(size=(OTHERS, classes)) * scale
            probabilities = np.exp(logits / temperature)
            shares = (probabilities / probabilities.sum(axis=1, keepdims=True)).cumsum(axis=1)
            labels = (shares > random.random((OTHERS, 1))).argmax(axis=1)
            each = losses(logits, labels)
            mean = each.mean(axis=1)
            for _ in range(REPEATS):
                some = each[:, random.integers(0, OTHERS, images)].sum(axis=1)
                chosen = [one, *(int((some + prior).argmin()) for prior in priors)]
                found.append(mean[chosen] - mean.min())
    return [float(cost) for cost in np.mean(found, axis=0)]


def main() -> None:
    random = np.random.default_rng(0)
    names = ["none" if s is None else f"{s:g}" for s in SPREADS]
    head = " | ".join(f"prior {name}" for name in names)
    lines = [f"| images | T = 1 | {head} |", "|---" * (2 + len(SPREADS)) + "|"]
    for images in IMAGES:
        cells = " | ".join(f"{cost:.3f}" for cost in costs(images, random))
        lines.append(f"| {images} | {cells} |")
    cases = len(CLASSES) * len(TEMPERATURES)
    lines += ["", f"Means of {cases} simulated classifiers and {REPEATS} draws each."]
    fill(DOCUMENT, "temperature", "\n".join(lines))


if __name__ == "__main__":
    main()
