"""Going on with an interrupted run: which of its settings may be others now."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from cnnft.config.schema import Config
from cnnft.data.dataset import Samples
from cnnft.errors import CnnftError, UsageError
from cnnft.runs.run import Run

_log = logging.getLogger(__name__)

FREE = frozenset(
    {"epochs", "patience", "workers", "device", "micro_batch", "checkpoint_every"}
    | {"skip_nonfinite", "cache", "precision", "read_timeout"}
)
"""Settings that change no step that was taken, or only how it is computed."""
PLACES = frozenset({"data", "layout", "include_hidden"})
"""Where the images lie, which may have moved: `Run.require_same_data` sees to the contents."""
FILES = frozenset({"teacher", "weights"})
"""Likewise, where there are such: the checkpoint has their hashes."""


def resumed_config(run: Run, given: dict[str, Any]) -> Config:
    """The run's settings, with the `given` ones that may change on the way.

    Raises:
        UsageError: one of the others differs, or the training would end before it does now.
        CnnftError: its images were moved, and nobody says to where.
    """
    before = run.config()
    saved = before.to_dict()
    moved = {name for name in FILES if saved.get(name) and _as_many(given.get(name), saved[name])}
    free = FREE | PLACES | moved
    other = [
        name.replace("_", "-")
        for name, value in given.items()
        if name not in free and not _same(value, saved.get(name))
    ]
    if other:
        raise UsageError(
            f"--resume {run.path} goes on with the settings of the run, which differ in "
            f"{', '.join(sorted(other))}: leave out, or start a new run"
        )
    place = {} if "data" in given else {"data": _find_data(run, Path(before.dataset.data))}
    config = before.replace(
        **place, **{name: value for name, value in given.items() if name in free}
    )
    epochs, planned = config.training.epochs, before.training.epochs
    averaging = config.averaging
    if epochs > planned and (averaging.swa or averaging.snapshots):
        raise UsageError(
            f"--epochs cannot be more than the {planned} of {run.path}: its --swa or --snapshots "
            "is about their end; start a new run"
        )
    if epochs < planned:
        raise UsageError(f"--epochs {epochs} is less than the {planned} of {run.path}")
    return config


def _find_data(run: Run, data: Path) -> Path:
    """Where the images are that lay in `data`: there, or moved together with the run.

    Raises:
        CnnftError: they are at neither place.
    """
    if data.exists():
        return data
    images = run.images()
    for parent in run.path.resolve().parents if images else ():
        moved = parent / data.name
        if images and _holds(moved, images["train"], data):
            _log.warning("%s is not there any more: going on with the images in %s", data, moved)
            return moved
    run.load_checkpoint()  # of an older cnnft it raises: the images would not help
    raise CnnftError(
        f"{run.path} cannot go on: its images are not in {data} any more; say where they are: "
        f"cnnft finetune --resume {run.path} DATA"
    )


def _holds(folder: Path, samples: Samples, data: Path) -> bool:
    """Whether the first image is there, as it was in `data`: all are checked when they are read."""
    file = folder / os.path.relpath(samples.paths[0], data)
    if not file.is_file():
        return False
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == samples.hashes[0]


def _as_many(given: Any, before: Any) -> bool:
    """Whether both are single files, or lists of as many."""
    lists = [isinstance(value, list | tuple) for value in (given, before)]
    return len(given) == len(before) if all(lists) else not any(lists)


def _same(given: Any, before: Any) -> bool:
    """Paths are saved absolute, and several values as a tuple."""
    if isinstance(given, list | tuple) and isinstance(before, list | tuple):
        pairs = zip(given, before, strict=False)
        return len(given) == len(before) and all(_same(a, b) for a, b in pairs)
    return given == before or os.path.abspath(str(given)) == str(before)  # noqa: PTH100
