"""The table of predictions in a run: one row for each image, one column for each class's logit."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import get_args

import torch

from cnnft.data.dataset import Samples
from cnnft.inference.predictions import Predictions, Role

COLUMNS = ("role", "fold", "file", "sha256", "label")
_LOGIT = "logit:"  # so that a class may have any name, "file" too


def to_csv(predictions: Predictions) -> bytes:
    """All digits of each logit are kept."""
    samples = predictions.samples
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"{_LOGIT}{name}" for name in samples.classes)])
    folds: Iterable[object] = predictions.folds or [""] * len(samples)
    rows = zip(
        folds, samples.paths, samples.hashes, samples.labels, predictions.logits.tolist(),
        strict=True,
    )  # fmt: skip
    for fold, path, digest, label, logits in rows:
        digits = (f"{logit:.9g}" for logit in logits)
        writer.writerow([predictions.role, fold, path, digest, samples.classes[label], *digits])
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def from_csv(lines: Iterable[str]) -> Predictions:
    """Raises `ValueError`: not such a table."""
    reader = csv.reader(lines)
    header = next(reader, [])
    if tuple(header[: len(COLUMNS)]) != COLUMNS:
        raise ValueError("it has other columns")
    classes = tuple(
        name.removeprefix(_LOGIT) for name in header[len(COLUMNS) :] if name.startswith(_LOGIT)
    )
    places = {name: label for label, name in enumerate(classes)}
    rows = list(_rows(reader, len(header)))
    if not rows or len({row[0] for row in rows}) != 1 or rows[0][0] not in get_args(Role):
        raise ValueError("it has no rows, or of several roles")
    role: Role = rows[0][0]  # type: ignore[assignment]
    try:
        samples = Samples(
            paths=tuple(row[2] for row in rows),
            labels=tuple(places[row[4]] for row in rows),
            classes=classes,
            hashes=tuple(row[3] for row in rows),
        )
    except KeyError as error:
        raise ValueError(f"the label {error} is no class") from error
    logits = torch.tensor(
        [[float(v) for v in row[len(COLUMNS) : len(COLUMNS) + len(classes)]] for row in rows]
    )
    folds = tuple(int(row[1]) for row in rows) if rows[0][1] else ()
    return Predictions(samples, logits, role, folds)


def _rows(reader: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    for row in reader:
        if len(row) != width:
            raise ValueError("a row is not whole")
        yield row
