"""The table of predictions in a run: one row for each image, one column for each class's logit."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, get_args

import numpy as np
import torch

from cnnft.data.dataset import Samples
from cnnft.inference.predictions import Predictions, Role
from cnnft.machine.files import read_csv, to_csv
from cnnft.runs.records import select_columns

_COLUMNS = ("role", "fold", "file", "sha256", "label")
_LOGIT = "logit:"  # so that a class may have any name, "file" too


def predictions_to_csv(predictions: Predictions) -> bytes:
    """All digits of each logit, as float32; fold is empty but for out-of-fold predictions."""
    header = [*_COLUMNS, *(_LOGIT + name for name in predictions.samples.classes)]
    return to_csv(header, _rows(predictions))


def _rows(predictions: Predictions) -> Iterator[list[object]]:
    samples = predictions.samples
    folds: Iterable[object] = predictions.folds or [""] * len(samples)
    columns = folds, samples.paths, samples.hashes, samples.labels, predictions.logits
    for fold, path, digest, label, logits in zip(*columns, strict=True):
        digits = (f"{logit:.9g}" for logit in logits.tolist())
        yield [predictions.role, fold, path, digest, samples.classes[label], *digits]


def predictions_from_csv(file: IO[bytes]) -> Predictions:
    """Raises `ValueError`: not such a table."""
    rows = read_csv(file)
    header = next(rows, [])
    logit_columns = [name for name in header if name.startswith(_LOGIT)]
    classes = tuple(name.removeprefix(_LOGIT) for name in logit_columns)
    places = {name: label for label, name in enumerate(classes)}
    if not classes or len(places) < len(classes):
        raise ValueError("it has no logits, or two columns of one class")
    cells, logits = [], []
    for row in select_columns(chain([header], rows), [*_COLUMNS, *logit_columns]):
        cells.append(tuple(row[: len(_COLUMNS)]))
        logits.append(np.array(row[len(_COLUMNS) :]).astype(np.float32))
    if not cells:
        raise ValueError("it has no rows")
    roles, folds, paths, hashes, labels = zip(*cells, strict=True)
    if unknown := sorted(set(labels) - places.keys()):
        raise ValueError(f"the label {unknown[0][:50]!r} is no class")
    if len(set(roles)) != 1 or roles[0] not in get_args(Role):
        raise ValueError("it is of several roles, or of an unknown one")
    if np.isnan(logits).any():
        raise ValueError("a logit is NaN")
    samples = Samples(paths, tuple(places[label] for label in labels), classes, hashes)
    return Predictions(
        samples,
        torch.from_numpy(np.stack(logits)),
        roles[0],
        tuple(map(int, folds)) if any(folds) else (),
    )
