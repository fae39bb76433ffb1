"""What is compared: each row of a table is a command, run as a user runs it."""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, measure
from benchmarks.peers import Job
from cnnft.runs.run import Run

PYTHON = sys.executable
VIEWS = "--feature-views"

FROZEN: dict[str, tuple[str, ...]] = {
    "cnnft, K = 1": (VIEWS, "1"),
    "cnnft": (),
    "cnnft, K = epochs": (VIEWS, "{epochs}"),
}
FINETUNED: dict[str, tuple[str, ...]] = {
    "cnnft": (),
    "cnnft, pixels in RAM": ("--cache", "ram"),
    "cnnft, pixels on disk": ("--cache", "disk"),
    "cnnft, no pixel cache": ("--cache", "off"),
}
"""Flags beside those that all have."""
START_UP = {"tutorial": "benchmarks.peers", "cnnft": "cnnft.cli.finetune, cnnft.training.finetune"}
"""What each imports, which takes seconds and teaches nothing."""
FEW = ("--mode", "feature-extractor", "--epochs", "1")

Facts = dict[str, Any]
"""accuracy, images_per_second, views, ...: what a row told of itself."""


def nothing() -> None: ...


@dataclass(frozen=True)
class Row:
    name: str
    command: tuple[str, ...]
    read: Callable[[str], Facts]
    """What it printed -> facts; `absent` says why there is no result."""
    before: Callable[[], object] = nothing
    """Not measured."""
    absent: str | None = None


@dataclass(frozen=True)
class Group:
    """Rows that take turns."""

    kind: str
    network: str
    baseline: str
    rows: tuple[Row, ...]
    pretrained: bool = True
    """Whether accuracy says something."""


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    data: Path
    """Has train/<class>/ and val/<class>/."""
    work: Path
    """For whatever is written."""
    networks: dict[str, Path] = field(default_factory=dict)
    """Name -> timm folder. The first has random weights: speed is measured on it, and accuracy on
    the other."""
    size: int = 224
    batch_size: int = 32
    epochs: int = 25
    finetune_epochs: int = 5
    device: str = "cpu"
    bf16: bool = False
    threads: int = 1
    copies: int = 10
    """How often `predict` meets each image, so that starting up does not hide the rest."""

    @property
    def environment(self) -> dict[str, str]:
        cache_folder = {"CNNFT_CACHE": str(self.work / "cache")}
        return os.environ | cache_folder | {"OMP_NUM_THREADS": str(self.threads)}

    def job(self, weights: Path, frozen: bool) -> Job:
        return Job(
            data=str(self.data),
            weights=str(weights),
            frozen=frozen,
            epochs=self.epochs if frozen else self.finetune_epochs,
            batch_size=self.batch_size,
            size=self.size,
            device=self.device,
            bf16=self.bf16,
        )

    def is_pretrained(self, network: str) -> bool:
        return network != next(iter(self.networks))

    def clear_cache(self) -> None:
        shutil.rmtree(self.work / "cache", ignore_errors=True)


def training(setting: Setting, network: str, frozen: bool, peers: list[str]) -> Group:
    """The tutorial loop, cnnft and the peers; fine-tuning beside the limit."""
    job = setting.job(setting.networks[network], frozen)
    kind = "feature-extractor" if frozen else "finetune"
    flags = FROZEN if frozen else FINETUNED
    rows = [peer(name, job) for name in peers]
    for name, own in flags.items():
        rows.append(finetuning(setting, job, name, own))
        if frozen and name == "cnnft":
            again = finetuning(setting, job, "cnnft, again", own, keeps_cache=True)
            rows.append(again)
    for name, modules in START_UP.items():
        rows.append(Row(f"start-up of {name}", (PYTHON, "-c", f"import {modules}"), lambda out: {}))
    if not frozen:
        command = (PYTHON, "-m", "benchmarks.limit", json.dumps(asdict(job)))
        rows.append(Row("limit", command, lambda out: {"throughput": json.loads(out)}))
    return Group(kind, network, "tutorial", tuple(rows), setting.is_pretrained(network))


def inference(setting: Setting, network: str) -> list[Group]:
    """cnnft's predict and evaluate beside timm's scripts, on a network that cnnft trained."""
    weights = setting.networks[network]
    run = setting.work / "runs" / f"to-predict-{weights.name}"
    train = partial(make_run, setting, run, _finetune(setting, weights, run.name, FEW))
    images = _copies(setting.data, setting.work / "to-predict", setting.copies)
    common = ("-m", str(run), *_common(setting), *_precision(setting))
    predict = cnnft("predict", str(images), *common)
    evaluate = cnnft("evaluate", str(setting.data), "--split", "val", *common)
    job, pretrained = setting.job(run, frozen=True), setting.is_pretrained(network)
    return [
        Group("predict", network, "timm-inference", (
            peer("timm-inference", replace(job, data=str(images)), train),
            Row("cnnft", predict, _right_folder, train, _missing(predict)),
        ), pretrained),
        Group("evaluate", network, "timm-validate", (
            peer("timm-validate", job, train),
            Row("cnnft", evaluate, _accuracy, train, _missing(evaluate)),
        ), pretrained),
    ]  # fmt: skip


def make_run(setting: Setting, run: Path, command: tuple[str, ...]) -> None:
    """What has to be there before something else is measured."""
    if not run.exists():
        measure(command, setting.environment)


def peer(name: str, job: Job, before: Callable[[], object] = nothing) -> Row:
    command = (PYTHON, "-m", "benchmarks.peers", name, json.dumps(asdict(job)))
    return Row(name, command, lambda out: json.loads(out.splitlines()[-1]), before)


def cnnft(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "cnnft", *arguments)


def finetuning(
    setting: Setting, job: Job, name: str, flags: tuple[str, ...], keeps_cache: bool = False
) -> Row:
    command = _finetune(
        setting,
        Path(job.weights),
        name.replace(" ", "-").replace(",", ""),
        (
            *("--mode", "feature-extractor" if job.frozen else "finetune"),
            *("--epochs", str(job.epochs), *_precision(setting)),
            *(flag.format(epochs=job.epochs) for flag in flags),
        ),
    )
    needed = (*command, VIEWS) if keeps_cache else command
    before = nothing if keeps_cache else setting.clear_cache
    return Row(name, command, _of_run, before, _missing(needed))


def _finetune(setting: Setting, weights: Path, run: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    return cnnft(
        *("finetune", str(setting.data), "--backbone", f"local-dir:{weights}"),
        *("--image-size", str(setting.size), "--runs-dir", str(setting.work / "runs")),
        *("--name", run, "--force", *_common(setting), *flags),
    )


def _common(setting: Setting) -> tuple[str, ...]:
    batches = ("--batch-size", str(setting.batch_size))
    return (*batches, "--device", setting.device, "--json", "--quiet")


def _precision(setting: Setting) -> tuple[str, ...]:
    return ("--precision", "bfloat16") if setting.bf16 else ()


def _missing(command: tuple[str, ...]) -> str | None:
    """Which flag this cnnft does not have."""
    for word in command:
        if word.startswith("--") and word not in _help(command[3]):
            return f"cnnft {command[3]} has no {word}"
    return None


@cache
def _help(command: str) -> str:
    wide = os.environ | {"COLUMNS": "300"}
    asked = cnnft(command, "--help")
    return subprocess.run(
        asked, cwd=ROOT, env=wide, capture_output=True, text=True, check=True
    ).stdout


def _of_run(out: str) -> Facts:
    result = json.loads(out)
    run = Path(result["run"])
    with (run / "history.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return {
        "accuracy": result["val"]["accuracy"],
        "images_per_second": result["train"]["n"] / statistics.median(seconds),
        "views": Run(run).config().views,
    }


def _right_folder(out: str) -> Facts:
    predicted = json.loads(out)
    right = [Path(image["file"]).parent.name == image["label"] for image in predicted]
    return {"accuracy": statistics.mean(right), "images": len(right)}


def _accuracy(out: str) -> Facts:
    return {"accuracy": json.loads(out)["accuracy"]}


def _copies(data: Path, folder: Path, copies: int) -> Path:
    """folder/<class>/*: links to all images of train/ and val/, each several times."""
    for source in sorted(path for path in data.glob("*/*/*") if path.is_file()):
        place = folder / source.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            link = place / f"{copy}-{source.parent.parent.name}-{source.name}"
            if not link.is_symlink():
                link.symlink_to(source.resolve())
    return folder
