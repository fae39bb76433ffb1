"""The weights of a run's model, and the scores and logits that speak of them.

They go together: whatever is killed, a run never has the scores of other weights than its own.
"""

import hashlib
import os
from pathlib import Path

from cnnft.machine import distributed
from cnnft.machine.files import writing_whole
from cnnft.runs.directory import WEIGHTS

_SCORES = ("metrics.json", "predictions.csv")


def save_weights(folder: Path, content: bytes) -> None:
    """The scores of the weights before go just before those weights do.

    Raises:
        CnnftError: the disk is full, and all is as before.
    """
    with writing_whole(folder / WEIGHTS) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a full disk is met here at the latest
        forget_scores(folder)


def forget_scores(folder: Path) -> None:
    """For a model that is becoming another one; the main process alone does something."""
    for name in _SCORES if distributed.is_main else ():
        (folder / name).unlink(missing_ok=True)


def has_scores(folder: Path) -> bool:
    """Whether those of its weights were saved."""
    return all((folder / name).is_file() for name in _SCORES)


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the weights' file; None: there is none."""
    if not (folder / WEIGHTS).is_file():
        return None
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
