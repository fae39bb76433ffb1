"""The images of a plan: read, and split into train and val."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from cnnft.config.schema import Config
from cnnft.config.solving import solves_head
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName
from cnnft.data.folders import OnFiles
from cnnft.data.reading import read_dataset
from cnnft.data.sources import open_source
from cnnft.data.split import train_and_val
from cnnft.errors import CnnftError
from cnnft.probe.folds import assign_folds
from cnnft.probe.solve import can_be_scored
from cnnft.runs.run import Run

_log = logging.getLogger(__name__)


def read(
    config: Config, run: Run | None, before: Mapping[SplitName, Samples] | None, on_files: OnFiles
) -> Dataset:
    """The images as the source separates them."""
    if run is None or before is None:
        return _read_splits(config, None, on_files)
    with _going_on(run):
        return _read_splits(config, before, on_files)


@contextmanager
def _going_on(run: Run) -> Iterator[None]:
    try:
        yield
    except CnnftError as error:
        if type(error) is not CnnftError:  # such as a flag, or a read that takes too long
            raise
        raise CnnftError(
            f"{run.path} cannot go on: {error}; if its images are elsewhere now: cnnft finetune "
            f"--resume {run.path} DATA"
        ) from error


def _read_splits(
    config: Config, before: Mapping[SplitName, Samples] | None, on_files: OnFiles
) -> Dataset:
    """The images that a run has had `before` say what a folder is: they hold its classes, and its
    split.
    """
    asked = config.dataset
    splits: tuple[SplitName, ...] = ("train", "val")
    classes = None if before is None else before["train"].classes
    source = open_source(
        asked.data,
        asked.layout,
        include_hidden=asked.include_hidden,
        classes=classes or (),
        on_files=on_files,
    )
    return read_dataset(
        source,
        splits,
        classes=classes,
        on_files=on_files,
        read_timeout=config.machine.read_timeout,
    )


def split(
    config: Config,
    dataset: Dataset,
    run: Run | None,
    before: Mapping[SplitName, Samples] | None,
) -> Dataset:
    """Training and validation images, of a `run` as `before`; no content of val is in train too."""
    hashes = None if before is None else before["val"].hashes
    fraction = 0.0 if solves_head(config) else config.dataset.val_fraction
    settled = train_and_val(dataset, fraction, config.dataset.split_seed, hashes)
    if config.dataset.strict:
        _require_all(settled.skipped)
    if solves_head(config) and not len(settled.splits["val"]):
        _require_scores(config, settled)
    if run is not None:
        run.require_same_data(settled.splits["train"], settled.splits["val"])
    return settled


def _require_scores(config: Config, dataset: Dataset) -> None:
    """Raises `CnnftError` where no image can be scored out of fold."""
    train = dataset.splits["train"]
    folds = assign_folds(train, config.freezing.folds)
    if not can_be_scored(torch.tensor(train.labels), folds).any():
        raise CnnftError(
            f"{dataset.source}: no class has two different images, so that none can be held out "
            "for validation: add images, or a val folder"
        )


def _require_all(skipped: Sequence[Skipped]) -> None:
    """Raises `CnnftError` where something is left out that is no usual company of images."""
    missed = [entry for entry in skipped if not entry.is_expected]
    if missed:
        more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        raise CnnftError(
            f"{missed[0].path}: {missed[0].reason}{more}; without --strict it is left out"
        )


def warn_of_known(teachers: tuple[str, ...], val: Samples) -> None:
    """A teacher that has learnt validation images may tell the student what is right there."""
    for teacher in teachers:
        if not Run.is_run(teacher):
            continue
        try:
            known = len(val) - len(val.without(Run.open(teacher).dataset().train.hashes))
        except CnnftError as error:
            _log.warning(
                "%s: whether --teacher was trained on validation images is not known", error
            )
            continue
        if known:
            _log.warning(
                "--teacher %s was trained on %d of the validation images: the score on val "
                "may be optimistic",
                *(teacher, known),
            )
