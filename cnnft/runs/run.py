"""The run directory: the only reader and writer of what training leaves behind.

    formats.json        the version of each file's format, and of the cnnft that wrote them
    config.toml         the settings, to run again with `cnnft finetune --config`
    config.json         the network, classes and preprocessing; timm opens the directory too
    model.safetensors   the weights of the best epoch so far
    snapshots/          with --snapshots the weights of each network of the snapshot ensemble
    history.csv         one row per epoch
    metrics.jsonl       the same for machines: one JSON object per epoch, with its step
    penalties.csv       instead of a history: the cross-validation of a head that was solved
    candidates/         with --mode auto the run of the network that was trained beside the head
    members/            with --ensemble the other classifiers whose probabilities are averaged
    comparison.json     and how the two compare on val
    metrics.json        the best epoch and its scores
    predictions.csv     the logits of each validation image, or out of fold of each training image
    environment.json    versions and machine
    data.csv            every image used: split, class, file, SHA-256, group, weight
    skipped.csv         every file left out, and why
    run.log             the log of `cnnft finetune`, with the time
    state/              checkpoints, to resume after an interruption
    tensorboard/        the history for TensorBoard, where that was asked for

Every file appears whole: it is written beside its place, synced and renamed. Only the log grows by
lines, and TensorBoard's files by events.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tomli_w
from torch import nn

from cnnft.config.file import read_config_file
from cnnft.config.schema import FIELDS, Config
from cnnft.data.dataset import Dataset, Samples, Skipped, SplitName
from cnnft.errors import CnnftError, UsageError
from cnnft.inference.classifier import Classifier, Description
from cnnft.inference.description import describe, parse_description
from cnnft.inference.predictions import Predictions
from cnnft.inference.storage import SNAPSHOT
from cnnft.machine import distributed
from cnnft.machine.files import parse_json, to_json, to_safetensors
from cnnft.runs import records, scores
from cnnft.runs.checkpoints import Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from cnnft.runs.directory import CONFIG, STATE, WEIGHTS, forget_replaced, locked, new_directory
from cnnft.runs.files import RunFiles
from cnnft.runs.formats import FORMATS, formats_to_json
from cnnft.runs.predictions import predictions_from_csv, predictions_to_csv
from cnnft.runs.records import Epoch, Penalty
from cnnft.runs.scores import Comparison, Evidence, Metrics
from cnnft.runs.weights import forget_scores, has_scores, save_weights, weights_hash

FILES = ("formats.json", "config.json", WEIGHTS, *FORMATS)

_log = logging.getLogger(__name__)
_LAUNCH = f"{STATE}/launch"


@dataclass(frozen=True)
class Run(RunFiles):
    """A directory that training writes and everything after it reads."""

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
        """A new, locked directory: `name`, or `name`-2, -3, ...; with --force `name` itself.

        What `force` replaces is kept, hidden, until the new run has weights.

        Raises:
            UsageError: `force` would replace something that is no run.
            CnnftError: the directory cannot be made; the run to replace is being trained.
        """
        with ExitStack() as stack:
            with new_directory(Path(config.run.runs_dir), name, force=config.run.force) as path:
                run = stack.enter_context(cls(path).locked())
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
        if not cls.is_run(path):
            raise UsageError(f"{path} is not a run: it has no {CONFIG}")
        return cls(path)

    @classmethod
    def is_run(cls, path: str | Path) -> bool:
        """Rather than a folder that holds a classifier alone, or a file."""
        return (Path(path) / CONFIG).is_file()

    def config(self) -> Config:
        """The settings that it was made with; those that only a newer cnnft has are ignored."""
        self._require_known(CONFIG)
        file = self.path / CONFIG
        settings = read_config_file(file)
        try:
            return Config.from_dict({k: v for k, v in settings.items() if k in FIELDS}, str(file))
        except UsageError as error:  # nobody gave these as flags now
            raise CnnftError(f"{file} is damaged: {error}") from error

    def save_config(self, config: Config) -> None:
        self._write("formats.json", formats_to_json())
        self._write(CONFIG, tomli_w.dumps(config.to_dict()).encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        if distributed.is_main:
            save_checkpoint(self.path / STATE, checkpoint)

    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.path / STATE)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole one; None: training begins from its start.

        Raises:
            CnnftError: the run is of a cnnft whose training this one cannot continue, or all
                are damaged and there is a model, which the first epoch of another would replace.
        """
        anew = f"start a new run, as with --config {self.path / CONFIG}"
        if self._require_known(STATE) < FORMATS[STATE]:
            raise CnnftError(
                f"{self.path} was begun by an older cnnft, whose training this one cannot "
                f"continue: {anew}"
            )
        found = load_checkpoint(self.path / STATE)
        if found is None and self.has_checkpoint():
            if (self.path / WEIGHTS).exists():
                why = "all its checkpoints are damaged; its model is kept"
                raise CnnftError(f"{self.path} cannot go on: {why}: {anew}")
            _log.warning("no checkpoint is whole: training begins anew")
        return found

    def require_same_data(self, train: Samples, val: Samples) -> None:
        """Raises `CnnftError` where the images are not those that the run began with."""
        before = self.images()
        if before and (changes := records.what_changed(before, {"train": train, "val": val})):
            raise CnnftError(
                f"{self.path} cannot go on: since it began, {', and '.join(changes)}; make them "
                f"what they were (elsewhere: --resume {self.path} DATA), or start a new run"
            )

    def images(self) -> dict[SplitName, Samples] | None:
        """Those that it began with, by split; None: it was interrupted before that."""
        return self._read_if_there("data.csv", records.data_from_csv)

    def save_data(self, train: Samples, val: Samples, skipped: Sequence[Skipped]) -> None:
        """Which images it uses, and what their files are called now, in its predictions too."""
        before = self.images()
        self._write("data.csv", records.data_to_csv({"train": train, "val": val}))
        if skipped or (self.path / "skipped.csv").exists():
            self._write("skipped.csv", records.skipped_to_csv(skipped))
        if before and before["val"].paths != val.paths:
            with suppress(CnnftError):  # damaged, or of an epoch that comes again
                found = self.predictions()
                if found and found.samples.hashes == val.hashes:
                    self.save_predictions(replace(found, samples=val))

    def dataset(self) -> Dataset:
        """The images that it was trained and validated on; the files may have moved since.

        Raises:
            CnnftError: not all of them are listed.
        """
        path = self.path / "data.csv"
        splits, metrics = self._read("data.csv", records.data_from_csv), self.metrics()
        # What is missing here would be evaluated on although it was trained on.
        val = 0 if metrics.evidence == Evidence.OUT_OF_FOLD else metrics.val.n
        if [len(s) for s in splits.values()] != [metrics.train.n, val]:
            raise CnnftError(f"{path} is damaged: it does not list the images of the run")
        return Dataset(str(path), splits, self.skipped())

    def skipped(self) -> tuple[Skipped, ...]:
        """Files of its data that were left out."""
        return self._read_if_there("skipped.csv", records.skipped_from_csv) or ()

    def save_classifier(self, classifier: Classifier) -> None:
        """Weights and description. The weights come last: with them the run can be used. Those of
        an ensemble are there.
        """
        if classifier.is_ensemble:
            forget_scores(self.path)
        self._write("config.json", to_json(describe(classifier)))
        if distributed.is_main and not classifier.is_ensemble:
            save_weights(self.path, to_safetensors(classifier.network.state_dict()))
            forget_replaced(self.path)

    def save_snapshot(self, number: int, network: nn.Module) -> None:
        """The weights of one network of a snapshot ensemble."""
        self._write(SNAPSHOT.format(number), to_safetensors(network.state_dict()))

    def is_of(self, best_weights: str | None) -> bool:
        """Whether its model is that of a checkpoint's best epoch, with its scores."""
        found = weights_hash(self.path)
        return found == best_weights and (found is None or has_scores(self.path))

    def require_classifier(self, of_an_epoch: bool) -> None:
        """Raises `CnnftError` where an epoch's weights were saved and are not there any more."""
        for name in ("config.json", WEIGHTS):
            if of_an_epoch and not (self.path / name).is_file():
                raise CnnftError(f"{self.path} has lost its {name}: start a new run")

    def description(self) -> Description:
        """All of its classifier but the network."""
        path = self.path / "config.json"
        return self._read(
            "config.json", lambda file: parse_description(parse_json(file.read(), path), path)
        )

    def save_predictions(self, predictions: Predictions) -> None:
        """What the saved classifier says of the validation images; or, out of fold, what others
        like it say of the training images.
        """
        self._write("predictions.csv", predictions_to_csv(predictions))

    def predictions(self) -> Predictions | None:
        """None: the run was made before runs kept logits.

        Raises:
            CnnftError: they are not those of all images that the run was scored on.
        """
        found = self._read_if_there("predictions.csv", predictions_from_csv)
        if found is None:
            return None
        splits, hashes = self.dataset().splits, found.samples.hashes
        if found.role == "out-of-fold":
            whole = len(hashes) == self.metrics().val.n and set(hashes) <= set(
                splits["train"].hashes
            )
        else:
            whole = sorted(hashes) == sorted(splits["val"].hashes)
        if not whole:
            path = self.path / "predictions.csv"
            raise CnnftError(f"{path} is damaged: it does not list the images it was scored on")
        return found

    def save_environment(self, environment: dict[str, str]) -> None:
        self._write("environment.json", to_json(environment))

    def environment(self) -> dict[str, str] | None:
        """Versions and machine of its last session; None: it was made before runs kept them."""
        return self._read_if_there("environment.json", records.environment_from_json)

    def save_history(self, history: Sequence[Epoch], steps_per_epoch: int) -> None:
        self._write("history.csv", records.history_to_csv(history))
        self._write("metrics.jsonl", records.history_to_jsonl(history, steps_per_epoch))

    def history(self) -> list[Epoch]:
        return self._read("metrics.jsonl", records.history_from_jsonl)

    def save_penalties(self, penalties: Sequence[Penalty]) -> None:
        self._write("penalties.csv", records.penalties_to_csv(penalties))

    def penalties(self) -> list[Penalty] | None:
        """None: its head was trained by steps."""
        return self._read_if_there("penalties.csv", records.penalties_from_csv)

    def save_comparison(self, comparison: Comparison) -> None:
        self._write("comparison.json", to_json(asdict(comparison)))

    def comparison(self) -> Comparison | None:
        """None: nothing was compared, or not to the end."""
        return self._read_if_there("comparison.json", scores.comparison_from_json)

    def adopt(self, other: "Run") -> None:
        """Be the run that `other` is, but for its settings."""
        dataset = other.dataset()
        self.save_data(dataset.splits["train"], dataset.splits["val"], dataset.skipped)
        for name in ("history.csv", "metrics.jsonl", "config.json"):
            self._write(name, (other.path / name).read_bytes())
        if distributed.is_main:
            save_weights(self.path, (other.path / WEIGHTS).read_bytes())
        for name in ("predictions.csv", "metrics.json"):
            self._write(name, (other.path / name).read_bytes())

    def save_metrics(self, metrics: Metrics) -> None:
        self._write("metrics.json", scores.metrics_to_json(metrics))

    def metrics(self) -> Metrics:
        return self._read("metrics.json", scores.metrics_from_json)
