"""The records of a run: what its files hold, to bytes and from a file.

A reader raises `ValueError`, `KeyError` or `TypeError` where the file is damaged, and ignores keys
and columns that it does not know.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, TypeVar

from cnnft.data.dataset import Samples, Skipped, SplitName
from cnnft.machine.files import known, parse_json, read_csv, to_csv

T = TypeVar("T")


@dataclass(frozen=True)
class Epoch:
    """One row of the history. Training figures are of images as they were drawn and augmented,
    during the epoch.
    """

    epoch: int
    """From 1."""
    lr_backbone: float
    """Learning rates at the end of the epoch; 0 where frozen."""
    lr_head: float
    train_loss: float
    """Plain cross-entropy, to compare with `val_loss`."""
    train_objective: float
    """What training minimised: with smoothing, class weights, distillation, auxiliary losses."""
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_macro_recall: float
    """Balanced accuracy: the mean of the classes' recalls."""
    val_calibrated_loss: float
    """After temperature, whatever the classes' weights: what epochs are chosen by. Where training
    weighs all classes equally (`Config.balanced`) they weigh the same in it too."""
    seconds: float
    """Training only."""
    best: bool
    """The best up to here, the starting point included, so the run holds its weights."""

    @property
    def gap(self) -> float:
        """Training minus validation accuracy: where it grows, the network overfits."""
        return self.train_accuracy - self.val_accuracy


def history_to_csv(history: Sequence[Epoch]) -> bytes:
    names = [field.name for field in fields(Epoch)]
    return to_csv(names, [asdict(epoch).values() for epoch in history])


def history_to_jsonl(history: Sequence[Epoch], steps_per_epoch: int) -> bytes:
    """One JSON object per epoch, with the number of steps taken by its end."""
    rows = [asdict(epoch) | {"step": epoch.epoch * steps_per_epoch} for epoch in history]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def history_from_jsonl(file: IO[bytes]) -> list[Epoch]:
    rows = [parse_json(line, file.name) for line in file]
    # The first format had one figure, which was the objective; later ones knew no temperature.
    old = {"train_objective": "train_loss", "val_calibrated_loss": "val_loss"}
    return [record(Epoch, {n: row[o] for n, o in old.items()} | row) for row in rows]


@dataclass(frozen=True)
class Penalty:
    """One row of penalties.csv: a penalty tried in the cross-validation of a solved head."""

    features: str
    """What the head reads: last or stages."""
    penalty: float
    """On the squared weights, beside the mean loss; of standardised features."""
    n: int
    """Images that were predicted out of fold."""
    accuracy: float
    loss: float
    temperature: float
    """With which the loss is lowest."""
    calibrated_loss: float
    """With it; this chooses the penalty."""
    chosen: bool


def penalties_to_csv(penalties: Sequence[Penalty]) -> bytes:
    names = [field.name for field in fields(Penalty)]
    return to_csv(names, [asdict(penalty).values() for penalty in penalties])


def penalties_from_csv(file: IO[bytes]) -> list[Penalty]:
    names = [field.name for field in fields(Penalty)]
    found = []
    for depth, penalty, n, *scores, chosen in select_columns(read_csv(file), names):
        accuracy, loss, temperature, calibrated = map(float, scores)
        numbers = int(n), accuracy, loss, temperature, calibrated
        found.append(Penalty(depth, float(penalty), *numbers, chosen=chosen == "True"))
    return found


def environment_from_json(file: IO[bytes]) -> dict[str, str]:
    """Name -> version, as `machine.environment` said it."""
    values = parse_json(file.read(), file.name)
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError("it holds other values than strings")
    return values


_DATA = ("split", "class", "file", "sha256", "group", "weight")
"""Columns of data.csv; the last two are empty where the data have none."""


def data_to_csv(splits: Mapping[SplitName, Samples]) -> bytes:
    return to_csv(_DATA, _data_rows(splits))


def _data_rows(
    splits: Mapping[SplitName, Samples],
) -> Iterator[tuple[str, str, str, str, str, float | None]]:
    """The cells of each image; "" or None where the data have no groups or weights."""
    for split, samples in splits.items():
        groups = samples.groups or [""] * len(samples)
        weights = samples.weights or [None] * len(samples)
        columns = samples.labels, samples.paths, samples.hashes, groups, weights
        for label, path, digest, group, weight in zip(*columns, strict=True):
            yield split, samples.classes[label], path, digest, group, weight


def data_from_csv(file: IO[bytes]) -> dict[SplitName, Samples]:
    """The classes are those of the training images, which come in their order."""
    splits: dict[str, list[tuple[str, ...]]] = {"train": [], "val": []}
    for split, *cells in select_columns(read_csv(file), _DATA[:4], _DATA[4:]):
        if split not in splits:
            raise ValueError(f"it has a split {split[:20]!r}")
        splits[split].append(tuple(cells))
    places: defaultdict[str, int] = defaultdict(lambda: len(places))
    labels = {split: [places[row[0]] for row in rows] for split, rows in splits.items()}
    found = {name: _samples(rows, labels[name], tuple(places)) for name, rows in splits.items()}
    return {"train": found["train"], "val": found["val"]}


def what_changed(
    before: Mapping[SplitName, Samples], now: Mapping[SplitName, Samples]
) -> list[str]:
    """How the images of `now` differ from those of `before`, by content: clauses with a number and
    the first file of each kind; none where training makes the same of them, in the same order.
    """
    if _uses(before) == _uses(now):
        return []
    gone, new = _surplus(before, now), _surplus(now, before)
    both = {digest for digest, _ in gone} & {digest for digest, _ in new}
    found = {
        "not there, or changed": [path for digest, path in gone if digest not in both],
        "in another split or class": [path for digest, path in gone if digest in both],
        "new, or changed": [path for digest, path in new if digest not in both],
    }
    return [
        f"{len(paths)} image(s) are {what}, such as {paths[0]}"
        for what, paths in found.items()
        if paths
    ] or ["the order of its classes is another"]


def _surplus(
    splits: Mapping[SplitName, Samples], others: Mapping[SplitName, Samples]
) -> list[tuple[str, str]]:
    """(SHA-256, file) of the images that the others have not, or less often."""
    left, found = Counter(_uses(others)), []
    paths = (path for samples in splits.values() for path in samples.paths)
    for use, path in zip(_uses(splits), paths, strict=True):
        left[use] -= 1
        if left[use] < 0:
            found.append((use[2], path))
    return found


def _uses(splits: Mapping[SplitName, Samples]) -> list[tuple[str, str, str, str, float]]:
    """(split, class, SHA-256, group, weight) of each image, wherever its file lies."""
    return [
        (split, name, digest, group, 1.0 if weight is None else weight)
        for split, name, _, digest, group, weight in _data_rows(splits)
    ]


def _samples(rows: list[tuple[str, ...]], labels: list[int], classes: tuple[str, ...]) -> Samples:
    _, paths, hashes, groups, weights = zip(*rows, strict=True) if rows else [()] * 5
    if any(len(digest) != 64 for digest in hashes):
        raise ValueError("a hash is not whole")
    return Samples(
        paths, tuple(labels), classes, hashes,
        groups=groups if any(groups) else (),
        weights=tuple(map(float, weights)) if any(weights) else (),
    )  # fmt: skip


_SKIPPED = ("file", "reason", "files", "images")


def skipped_to_csv(skipped: Sequence[Skipped]) -> bytes:
    return to_csv(_SKIPPED, [(s.path, s.reason, s.files, s.images) for s in skipped])


def skipped_from_csv(file: IO[bytes]) -> tuple[Skipped, ...]:
    """Runs of before the numbers list each file."""
    rows = select_columns(read_csv(file), _SKIPPED[:2], _SKIPPED[2:])
    return tuple(
        Skipped(path, reason, int(files or 1), int(images or 1))
        for path, reason, files, images in rows
    )


def select_columns(
    rows: Iterator[list[str]], needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[list[str]]:
    """The cells of these columns, in this order; "" in an optional column that is not there."""
    header = next(rows, [])
    if missing := sorted(set(needed) - set(header)):
        raise ValueError(f"it has no column {missing[0]}")
    places = [header.index(name) if name in header else None for name in (*needed, *optional)]
    for row in rows:
        yield ["" if place is None else row[place] for place in places]


def record(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `cls` from JSON values, each of its field's type."""
    given = known(cls, values)
    for field in fields(cls):  # type: ignore[arg-type]
        allowed = (int, float) if field.type is float else field.type
        if not isinstance(given[field.name], allowed):  # type: ignore[arg-type]
            raise ValueError(f"{field.name} is not of the right type")
    return cls(**given)
