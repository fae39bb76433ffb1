"""Going on with an interrupted run: which of its settings may be others now."""

import os
from typing import Any

from cnnft.config.schema import Config
from cnnft.errors import UsageError
from cnnft.runs.run import Run

FREE = frozenset(
    {"epochs", "patience", "workers", "device", "micro_batch", "checkpoint_every"}
    | {"skip_nonfinite", "cache", "precision"}
)
"""Settings that change no step that was taken, or only how it is computed."""


def resumed_config(run: Run, given: dict[str, Any]) -> Config:
    """The run's settings, with the `given` ones that may change on the way.

    Raises:
        UsageError: one of the others differs, or the training would end before it does now.
    """
    before = run.config()
    saved = before.to_dict()
    other = [
        name.replace("_", "-")
        for name, value in given.items()
        if name not in FREE and not _same(value, saved.get(name))
    ]
    if other:
        raise UsageError(
            f"--resume {run.path} goes on with the settings of the run, which differ in "
            f"{', '.join(sorted(other))}: leave out, or start a new run"
        )
    config = before.replace(**{name: value for name, value in given.items() if name in FREE})
    epochs, planned = config.training.epochs, before.training.epochs
    averaging = config.averaging
    if epochs > planned and (averaging.swa or averaging.snapshots or averaging.recalibrate_bn):
        raise UsageError(
            f"--epochs cannot be more than the {planned} of {run.path}: its --swa, --snapshots "
            "or --recalibrate-bn is about their end; start a new run"
        )
    if epochs < planned:
        raise UsageError(f"--epochs {epochs} is less than the {planned} of {run.path}")
    return config


def _same(given: Any, before: Any) -> bool:
    """Paths are saved absolute, and several values as a tuple."""
    if isinstance(given, list | tuple) and isinstance(before, list | tuple):
        pairs = zip(given, before, strict=False)
        return len(given) == len(before) and all(_same(a, b) for a, b in pairs)
    return given == before or os.path.abspath(str(given)) == str(before)  # noqa: PTH100
