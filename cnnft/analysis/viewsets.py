"""What test-time augmentation brings: one classifier, the same images, each set of views."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cnnft.config.texts import VIEWS, view_count
from cnnft.data.dataset import Samples
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import Inference, predict
from cnnft.metrics import Score, calibration_error, tango_interval

SETS = (*VIEWS, "random:10")
"""What `--tta all` compares."""


@dataclass(frozen=True)
class ViewSetScore:
    """How good the classifier is with one set of views."""

    name: str
    score: Score
    calibration_error: float
    difference: tuple[float, float]
    """95 % interval of the accuracy minus that of the first set, paired (Tango, 1998)."""
    seconds: float
    """Of wall time, decoding included."""

    @property
    def views(self) -> int:
        return view_count(self.name)


def compare_view_sets(
    classifier: Classifier,
    samples: Samples,
    inference: Inference,
    names: Sequence[str] = SETS,
    on_image: Callable[[], object] = lambda: None,
) -> list[ViewSetScore]:
    """In the order of `names`; `on_image` is called once for each image and set."""
    scores: list[ViewSetScore] = []
    first = None
    for name in names:
        began = time.monotonic()
        found = predict(classifier, samples, replace(inference, tta=name), "test", on_image)
        seconds = time.monotonic() - began
        right = found.predicted == found.labels
        first = right if first is None else first
        only = int((first & ~right).sum()), int((right & ~first).sum())
        scores.append(
            ViewSetScore(
                name=name,
                score=found.score(),
                calibration_error=calibration_error(found.log_probs, found.labels),
                difference=tango_interval(*only, len(samples)),
                seconds=seconds,
            )
        )
    return scores
