"""The run directory: the only reader and writer of what training leaves behind.

    config.toml         the settings, to run again with `cnnft finetune --config`
    config.json         the network, classes and preprocessing; timm opens the directory too
    model.safetensors   the weights of the best epoch so far
    history.csv         one row per epoch
    metrics.json        the best epoch and its scores
    data.csv            every image used: split, class, file, SHA-256
    skipped.csv         every file left out, and why
    state/              checkpoints, to go on after an interruption

Every file appears whole: it is written beside its place, synced and renamed.
"""

import csv
import io
import json
import shutil
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import tomli_w

from cnnft.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from cnnft.classifier import Classifier
from cnnft.config import Config
from cnnft.data import Samples, Skipped
from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.files import parse_json, to_safetensors, write_whole

FILES = (
    *("config.toml", "config.json", "model.safetensors", "history.csv", "metrics.json"),
    *("data.csv", "skipped.csv"),
)

_COLUMNS = ("split", "class", "file", "sha256")
"""Of data.csv."""


@dataclass(frozen=True)
class Epoch:
    """One row of the history. Training figures are of augmented images, during the epoch."""

    epoch: int
    """From 1."""
    lr_backbone: float
    """Learning rates at the end of the epoch; 0 where frozen."""
    lr_head: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    """Training only."""
    best: bool
    """The best up to here, so the run holds its weights: by val accuracy, then by val loss."""

    @property
    def gap(self) -> float:
        """Training minus validation accuracy: where it grows, the network overfits."""
        return self.train_accuracy - self.val_accuracy


@dataclass(frozen=True)
class Run:
    """A directory that training writes and everything after it reads."""

    path: Path

    @classmethod
    def create(cls, config: Config, name: str) -> "Run":
        """A new, empty directory: `name`, or `name`-2, -3, ...; with `config.force` `name` itself.

        Raises:
            UsageError: `force` would delete something that is no run.
            CnnftError: the directory cannot be made.
        """
        runs_dir = Path(config.runs_dir)
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            if config.force:
                _remove_run(runs_dir / name)
            for number in count(1):
                path = runs_dir / (name if number == 1 else f"{name}-{number}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                run = cls(path)
                break
        except OSError as error:
            raise CnnftError(
                f"{runs_dir}: a run cannot be made there ({error.strerror}); see --runs-dir"
            ) from error
        run.save_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run.

        Raises:
            UsageError: no such directory, or it is no run.
        """
        path = Path(path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such run")
        if not (path / "config.toml").is_file():
            raise UsageError(f"{path} is not a run: it has no config.toml")
        return cls(path)

    def config(self) -> Config:
        """The settings that it was made with."""
        file = self.path / "config.toml"
        return Config.from_dict(read_config_file(file), str(file))

    def save_config(self, config: Config) -> None:
        self._write("config.toml", tomli_w.dumps(config.to_dict()).encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        save_checkpoint(self.path / "state", checkpoint)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole one; None: training begins from its start."""
        return load_checkpoint(self.path / "state")

    def require_same_data(self, train: Samples, val: Samples) -> None:
        """Raises `CnnftError` where the images are not those that the run began with."""
        if not (self.path / "data.csv").exists():  # it was interrupted before it began
            return
        before = [(row["split"], row["sha256"]) for row in self._rows()]
        now = [("train", digest) for digest in train.hashes]
        now += [("val", digest) for digest in val.hashes]
        if before != now:
            changed = len(set(before) ^ set(now))
            raise CnnftError(
                f"{self.path} cannot go on: {changed} image(s) of its data were added, removed or "
                "changed since it began; start a new run"
            )

    def save_data(self, train: Samples, val: Samples, skipped: Sequence[Skipped]) -> None:
        rows = [
            (split, samples.classes[label], path, digest)
            for split, samples in (("train", train), ("val", val))
            for path, label, digest in zip(
                samples.paths, samples.labels, samples.hashes, strict=True
            )
        ]
        self._write("data.csv", _csv(_COLUMNS, rows))
        if skipped:
            reasons = [(file.path, file.reason) for file in skipped]
            self._write("skipped.csv", _csv(("file", "reason"), reasons))

    def hashes(self, split: str) -> frozenset[str]:
        """SHA-256 of the images that served as `split` ("train" or "val")."""
        return frozenset(row["sha256"] for row in self._data() if row["split"] == split)

    def files(self, split: str) -> list[Path]:
        """The images that served as `split`; they may have moved since."""
        return [Path(row["file"]) for row in self._data() if row["split"] == split]

    def _rows(self) -> list[dict[str, str]]:
        path = self.path / "data.csv"
        try:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise CnnftError(f"{path} cannot be read ({error.strerror})") from error
        except csv.Error as error:
            raise CnnftError(f"{path} is damaged ({first_line(error)})") from error
        if any(row.keys() != set(_COLUMNS) or None in row.values() for row in rows):
            raise CnnftError(f"{path} is damaged: it does not list the images of the run")
        return rows

    def _data(self) -> list[dict[str, str]]:
        """What data.csv lists, checked to be all of it."""
        path, rows = self.path / "data.csv", self._rows()
        # What is missing here would be evaluated on although it was trained on.
        counts = Counter(row["split"] for row in rows)
        metrics = self.metrics()
        try:
            expected = {split: metrics[split]["n"] for split in ("train", "val")}
        except (KeyError, TypeError) as error:
            raise CnnftError(
                f"{self.path / 'metrics.json'} is damaged: it does not say how many images the "
                "run had"
            ) from error
        whole = all(len(row["sha256"]) == 64 for row in rows)
        if counts != expected or not whole:
            raise CnnftError(f"{path} is damaged: it does not list the images of the run")
        return rows

    def save_classifier(self, classifier: Classifier) -> None:
        """Weights and description. The weights come last: with them the run can be used."""
        self._write("config.json", _json(classifier.describe()))
        self._write("model.safetensors", to_safetensors(classifier.network.state_dict()))

    def save_history(self, history: Sequence[Epoch]) -> None:
        names = [field.name for field in fields(Epoch)]
        self._write("history.csv", _csv(names, [asdict(epoch).values() for epoch in history]))

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        self._write("metrics.json", _json(metrics))

    def metrics(self) -> dict[str, Any]:
        path = self.path / "metrics.json"
        try:
            return parse_json(path.read_bytes(), path)
        except OSError as error:
            raise CnnftError(f"{path} cannot be read ({error.strerror})") from error

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, content)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings of a config.toml; `Config.from_dict` checks them."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CnnftError(f"{path} is not valid TOML ({first_line(error)})") from error


def _remove_run(path: Path) -> None:
    if not path.exists():
        return
    if not (path / "config.toml").is_file():
        raise UsageError(f"--force would delete {path}, which is not a run: choose another --name")
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    path.rename(doomed / path.name)
    shutil.rmtree(doomed)


def _csv(header: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
