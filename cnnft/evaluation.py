"""A classifier and a folder -> how good it is on images that it was not trained on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cnnft import data
from cnnft.acceleration import choose_precision
from cnnft.batches import default_workers, view_batches
from cnnft.classifier import Classifier
from cnnft.config import Precision, Split, TestTimeViews
from cnnft.data import OnFiles, Samples, Skipped
from cnnft.errors import CnnftError, UsageError
from cnnft.folding import folded
from cnnft.inference import infer_all
from cnnft.memory import largest_inference_batch
from cnnft.metrics import (
    ClassScore,
    MacroScore,
    Score,
    calibration_error,
    class_scores,
    confusion_matrix,
    macro_average,
    score,
    top_k_accuracy,
)
from cnnft.transforms import VIEWS, EvaluationViews, Normalizing


@dataclass(frozen=True)
class Evaluation:
    """Scores of one classifier on one set of images."""

    overall: Score
    top5: float | None
    """None for five classes or fewer."""
    calibration_error: float
    """Expected, of the probability that the predicted class is given."""
    classes: tuple[ClassScore, ...]
    confusion: list[list[int]]
    """Rows are true classes, columns predicted ones."""
    left_out: int
    """Images that the classifier was trained on."""
    selected_on: int
    """Of the evaluated images, those on which training chose its best epoch."""
    skipped: tuple[Skipped, ...]

    @property
    def chance(self) -> float:
        """Accuracy of always answering the commonest class."""
        return max(row.n for row in self.classes) / self.overall.n

    @property
    def macro(self) -> MacroScore:
        return macro_average(self.classes)


def evaluate_folder(
    classifier: Classifier,
    folder: str | Path,
    split: Split = "val",
    *,
    trained_on: Iterable[str] = (),
    selected_on: Iterable[str] = (),
    tta: TestTimeViews = "none",
    batch_size: int | Literal["auto"] = 32,
    workers: int | None = None,
    precision: Precision = "float32",
    on_files: OnFiles = lambda count, total: None,
    on_image: Callable[[int], object] = lambda total: None,
) -> Evaluation:
    """Evaluate on a split of `folder`; where it has none, on all of it (val: on train).

    Images whose hash is in `trained_on` are left out; `selected_on` are only counted.
    `on_files` is told of files as they are found and checked (see `data.OnFiles`); `on_image`
    with the number of images to evaluate, once for each that was.

    Raises:
        UsageError: the folder or the split is missing.
        CnnftError: classes that the classifier does not know, or no image remains.
    """
    device = next(classifier.network.parameters()).device
    precision = choose_precision(precision, device)
    samples = _find(data.require_folder(folder), split, classifier.classes, on_files)
    total = len(samples)
    samples = data.check(samples, on_file=lambda: on_files(1, total))
    kept = data.without(samples, trained_on)
    if not len(kept):
        if len(samples):
            raise CnnftError(
                f"all {len(samples)} images of {folder} ({split}) were trained on: "
                "evaluate on images that the model has not seen"
            )
        raise CnnftError(f"{folder} ({split}) holds no readable image")
    spec = classifier.input_spec
    if batch_size == "auto":
        batch_size = largest_inference_batch(classifier.network, spec.size, VIEWS[tta])
    batches = view_batches(
        kept.paths,
        EvaluationViews(spec, tta).as_bytes,
        batch_size,
        default_workers() if workers is None else workers,
        pinned=device.type == "cuda",
    )
    log_probs = infer_all(
        Normalizing(folded(classifier.network, spec.size), spec),
        batches,
        kept.paths,
        on_image=lambda: on_image(len(kept)),
        precision=precision,
    )
    labels = torch.tensor(kept.labels)
    chosen_on = set(selected_on)
    return Evaluation(
        overall=score(log_probs, labels),
        top5=top_k_accuracy(log_probs, labels, 5) if len(classifier.classes) > 5 else None,
        calibration_error=calibration_error(log_probs, labels),
        classes=class_scores(log_probs, labels, classifier.classes),
        confusion=confusion_matrix(log_probs, labels).tolist(),
        left_out=len(samples) - len(kept),
        selected_on=sum(digest in chosen_on for digest in kept.hashes),
        skipped=samples.skipped,
    )


def _find(folder: Path, split: Split, classes: tuple[str, ...], on_files: OnFiles) -> Samples:
    parts = [f for name in data.SPLIT_FOLDERS if (f := data.find_split(folder, name))]
    if split == "all":
        return data.join([data.scan(part, classes, on_files) for part in parts or [folder]])
    part = data.find_split(folder, split)
    if part is not None:
        return data.scan(part, classes, on_files)
    if split == "val" and (train := data.find_split(folder, "train")):
        return data.scan(train, classes, on_files)  # finetune splits val off this folder
    if parts or split == "test":
        found = ", ".join(part.name for part in parts) or "class folders only"
        raise UsageError(f"{folder} has no {split} folder ({found}): choose another --split")
    return data.scan(folder, classes, on_files)
