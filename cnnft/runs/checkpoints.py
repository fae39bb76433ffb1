"""The state of a training run on disk, so that it can go on where it stopped.

A checkpoint is one safetensors file whose name holds the step and the SHA-256 of its content. The
newest two are kept: where one is damaged, the one before it serves.
"""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cnnft.config.texts import parse_interval
from cnnft.errors import CnnftError
from cnnft.machine.files import parse_json, to_safetensors, write_whole

KEPT = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Interval:
    """When the next checkpoint is due: `--checkpoint-every`."""

    def __init__(self, every: str, step: int) -> None:
        self.seconds, self.steps = parse_interval(every)
        self.saved(step)

    def saved(self, step: int) -> None:
        self.step, self.time = step, time.monotonic()

    def due(self, step: int) -> bool:
        long = time.monotonic() - self.time >= self.seconds
        return long or step - self.step >= self.steps


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises `CnnftError` where it cannot be written; earlier checkpoints are then still there."""
    content = to_safetensors(checkpoint.tensors, {"values": json.dumps(checkpoint.values)})
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{checkpoint.step:010d}-{digest}.safetensors"
    write_whole(path, content)
    others = [other for other in _newest_first(folder) if other != path]
    older = [other for other in others if other.name < path.name]
    for other in set(others) - set(older[: KEPT - 1]):  # newer ones were damaged
        other.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole one; None where there is none. A damaged one is logged."""
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (CnnftError, SafetensorError, OSError, KeyError, TypeError, ValueError):
            _log.warning("the checkpoint %s is damaged", path)
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one, whole or not."""
    return bool(_newest_first(folder))


def _read(path: Path) -> Checkpoint:
    step, _, digest = path.stem.partition("-")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != digest:
        raise CnnftError(f"{path} is damaged")
    return Checkpoint(int(step), load(content), _values(content, path))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.safetensors"), reverse=True)


def _values(content: bytes, path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file: JSON after its length in 8 bytes."""
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length], path)
    return parse_json(header["__metadata__"]["values"], path)
