"""The run directory: the only reader and writer of what training leaves behind.

    config.toml         the settings, to run again with `cnnft finetune --config`
    config.json         the network, classes and preprocessing; timm opens the directory too
    model.safetensors   the weights of the best epoch so far
    snapshots/          with --snapshots the weights of each network that votes
    history.csv         one row per epoch
    metrics.jsonl       the same for machines: one JSON object per epoch, with its step
    metrics.json        the best epoch and its scores
    predictions.csv     what the model says of each validation image: the logits of all classes
    environment.json    versions and machine
    data.csv            every image used: split, class, file, SHA-256
    skipped.csv         every file left out, and why
    run.log             what `cnnft finetune` said, with the time
    state/              checkpoints, to go on after an interruption
    tensorboard/        the history for TensorBoard, where that was asked for

Every file appears whole: it is written beside its place, synced and renamed. Only the log grows by
lines, and TensorBoard's files by events.
"""

import csv
import hashlib
import io
import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from cnnft.config.schema import Config
from cnnft.data.dataset import Samples, Skipped
from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.inference.classifier import Classifier
from cnnft.inference.description import describe
from cnnft.inference.predictions import Predictions
from cnnft.inference.storage import SNAPSHOT, fill, read_tensors, voters
from cnnft.machine import distributed
from cnnft.machine.files import parse_json, to_safetensors, write_whole
from cnnft.runs.checkpoints import Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from cnnft.runs.directory import STATE, forget_replaced, locked, make_directory
from cnnft.runs.predictions import from_csv as predictions_from_csv
from cnnft.runs.predictions import to_csv as predictions_to_csv

FILES = (
    *("config.toml", "config.json", "model.safetensors", "history.csv", "metrics.jsonl"),
    *("metrics.json", "predictions.csv", "environment.json", "data.csv", "skipped.csv"),
    "run.log",
)

_COLUMNS = {
    "data.csv": ("split", "class", "file", "sha256"),
}

_LAUNCH = f"{STATE}/launch"


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
    """The mean of the classes' accuracies."""
    seconds: float
    """Training only."""
    best: bool
    """The best up to here, so the run holds its weights: by val accuracy, then by val loss. Where
    training makes all classes count alike (`Config.balanced`) by val macro recall instead."""

    @property
    def gap(self) -> float:
        """Training minus validation accuracy: where it grows, the network overfits."""
        return self.train_accuracy - self.val_accuracy


@dataclass(frozen=True)
class Run:
    """A directory that training writes and everything after it reads."""

    path: Path

    @property
    def log(self) -> Path:
        """For the command line to append to; a run that was made from Python has none."""
        return self.path / "run.log"

    @property
    def tensorboard(self) -> Path:
        """For the writer of that name."""
        return self.path / "tensorboard"

    @classmethod
    @contextmanager
    def create(cls, config: Config, name: str) -> "Iterator[Run]":
        """A new, locked directory: `name`, or `name`-2, -3, ...; with `config.run.force` `name` itself.

        What `force` replaces is kept, hidden, until the new run has weights.

        Raises:
            UsageError: `force` would replace something that is no run.
            CnnftError: the directory cannot be made; the run to replace is being trained.
        """
        make = partial(
            make_directory,
            Path(config.run.runs_dir),
            name,
            is_run="config.toml",
            has_weights="model.safetensors",
            force=config.run.force,
        )
        run = cls(distributed.broadcast_from_main(make))
        with run.locked():
            run.save_config(config)  # from here on it is a run
            if launch := distributed.launch():
                run._write(_LAUNCH, launch.encode())
            yield run

    @classmethod
    def of_this_launch(cls, runs_dir: str | Path) -> "Run | None":
        """The run that torchrun's processes made before it had to start them again."""
        launch = distributed.launch()
        if not launch:
            return None

        def find() -> Path | None:
            files = Path(runs_dir).glob(f"*/{_LAUNCH}")
            return next((f.parents[1] for f in files if f.read_text() == launch), None)

        path = distributed.broadcast_from_main(find)
        return None if path is None else cls(path)

    @contextmanager
    def locked(self) -> "Iterator[Run]":
        """Nobody else trains in it meanwhile; a process that dies lets go.

        Raises:
            CnnftError: somebody does.
        """
        with locked(self.path):
            yield self

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

    @classmethod
    def is_run(cls, path: str | Path) -> bool:
        """Rather than a folder that holds a classifier alone, or a file."""
        return (Path(path) / "config.toml").is_file()

    def config(self) -> Config:
        """The settings that it was made with."""
        file = self.path / "config.toml"
        return Config.from_dict(read_config_file(file), str(file))

    def save_config(self, config: Config) -> None:
        self._write("config.toml", tomli_w.dumps(config.to_dict()).encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        if distributed.is_main:
            save_checkpoint(self.path / STATE, checkpoint)

    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.path / STATE)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole one; None: training begins from its start."""
        return load_checkpoint(self.path / STATE)

    def require_same_data(self, train: Samples, val: Samples) -> None:
        """Raises `CnnftError` where the images are not those that the run began with."""
        if not (self.path / "data.csv").exists():  # it was interrupted before it began
            return
        before = [(row["split"], row["class"], row["sha256"]) for row in self._rows()]
        now = [(split, name, digest) for split, name, _, digest in _used(train, val)]
        if before != now:
            one, other = Counter(before), Counter(now)
            changed = max((one - other).total(), (other - one).total())
            what = f"{changed} image(s)" if changed else "the names of images"
            raise CnnftError(
                f"{self.path} cannot go on: {what} of its data were added, removed or changed "
                "since it began; start a new run"
            )

    def save_data(self, train: Samples, val: Samples, skipped: Sequence[Skipped]) -> None:
        self._write("data.csv", _csv(_COLUMNS["data.csv"], _used(train, val)))
        if skipped:
            reasons = [(file.path, file.reason) for file in skipped]
            self._write("skipped.csv", _csv(("file", "reason"), reasons))

    def hashes(self, split: str) -> frozenset[str]:
        """SHA-256 of the images that served as `split` ("train" or "val")."""
        return frozenset(row["sha256"] for row in self.images() if row["split"] == split)

    def files(self, split: str) -> list[Path]:
        """The images that served as `split`; they may have moved since."""
        return [Path(row["file"]) for row in self.images() if row["split"] == split]

    def _rows(self, name: str = "data.csv") -> list[dict[str, str]]:
        path = self.path / name
        try:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise CnnftError(f"{path} cannot be read ({error.strerror})") from error
        except csv.Error as error:
            raise CnnftError(f"{path} is damaged ({first_line(error)})") from error
        if any(row.keys() != set(_COLUMNS[name]) or None in row.values() for row in rows):
            raise CnnftError(f"{path} is damaged: it does not list the images of the run")
        return rows

    def images(self) -> list[dict[str, str]]:
        """The rows of data.csv: split, class, file, sha256.

        Raises:
            CnnftError: it does not list all images of the run.
        """
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
        self._write("config.json", _json(describe(classifier)))
        self._write("model.safetensors", to_safetensors(classifier.network.state_dict()))
        if distributed.is_main:
            forget_replaced(self.path)

    def save_snapshot(self, number: int, network: nn.Module) -> None:
        """The weights of one of the networks that will vote."""
        self._write(SNAPSHOT.format(number), to_safetensors(network.state_dict()))

    def save_vote(self, classifier: Classifier, snapshots: int) -> Classifier:
        """From now on the run's classifier is that of its snapshots, which is returned."""
        voting = replace(classifier, snapshots=snapshots)
        self._write("config.json", _json(describe(voting)))
        return replace(voting, network=voters(voting, self.path))

    def weights_hash(self) -> str | None:
        """SHA-256 of the best epoch's weights; None: no epoch has ended yet."""
        path = self.path / "model.safetensors"
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load_weights(self, network: nn.Module) -> None:
        """Those of the best epoch."""
        path = self.path / "model.safetensors"
        fill(network, read_tensors(path)[1], path)

    def require_classifier(self, of_an_epoch: bool) -> None:
        """Raises `CnnftError` where an epoch's weights were saved and are not there any more."""
        for name in ("config.json", "model.safetensors"):
            if of_an_epoch and not (self.path / name).is_file():
                raise CnnftError(f"{self.path} has lost its {name}: start a new run")

    def description(self) -> dict[str, Any]:
        """What `Classifier.describe` said of its classifier."""
        return self._read_json("config.json")

    def save_predictions(self, predictions: Predictions) -> None:
        """What the saved classifier says of the images that it was selected on."""
        self._write("predictions.csv", predictions_to_csv(predictions))

    def predictions(self) -> Predictions | None:
        """None: the run was made before runs kept logits.

        Raises:
            CnnftError: they are not those of all validation images of the run.
        """
        path = self.path / "predictions.csv"
        if not path.exists():
            return None
        try:
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                found = predictions_from_csv(file)
        except (OSError, ValueError, csv.Error) as error:
            raise CnnftError(f"{path} is damaged ({first_line(error)})") from error
        val = Counter(row["sha256"] for row in self.images() if row["split"] == "val")
        if Counter(found.samples.hashes) != val:
            raise CnnftError(f"{path} is damaged: it does not list the validation images")
        return found

    def save_environment(self, environment: dict[str, str]) -> None:
        self._write("environment.json", _json(environment))

    def environment(self) -> dict[str, str] | None:
        """Versions and machine of its last session; None: it was made before runs kept them."""
        exists = (self.path / "environment.json").exists()
        return self._read_json("environment.json") if exists else None

    def save_history(self, history: Sequence[Epoch], steps_per_epoch: int) -> None:
        names = [field.name for field in fields(Epoch)]
        rows = [asdict(epoch) for epoch in history]
        self._write("history.csv", _csv(names, [row.values() for row in rows]))
        lines = [json.dumps(row | {"step": row["epoch"] * steps_per_epoch}) for row in rows]
        self._write("metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        self._write("metrics.json", _json(metrics))

    def metrics(self) -> dict[str, Any]:
        return self._read_json("metrics.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return parse_json(path.read_bytes(), path)
        except OSError as error:
            raise CnnftError(f"{path} cannot be read ({error.strerror})") from error

    def _write(self, name: str, content: bytes) -> None:
        if distributed.is_main:
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


def _used(train: Samples, val: Samples) -> Iterator[tuple[str, str, str, str]]:
    """The rows of data.csv: split, class, file, SHA-256."""
    for split, samples in (("train", train), ("val", val)):
        rows = zip(samples.labels, samples.paths, samples.hashes, strict=True)
        for label, path, digest in rows:
            yield split, samples.classes[label], path, digest


def _csv(header: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
