"""cnnft and its peers on the same data, weights, image size, batch size and number of epochs.

    make bench BENCH="--data DIR --weights DIR --document"

Every row is a process of its own and takes turns with the others of its group, round by round, so
that whatever else the machine does meets all of them; the figures are medians over rounds, and
their range. Without --data and --weights everything is generated, and accuracy says nothing. With
--results an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.growth import growth
from benchmarks.measure import FailedError, measure
from benchmarks.report import (
    Record,
    Results,
    growth_table,
    limit_lines,
    machine,
    table,
    targets,
)
from benchmarks.rows import Group, Row, Setting, inference, training
from benchmarks.synthetic import draw_images, random_weights
from cnnft.machine.environment import environment
from tools.document import fill

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
KINDS = ("feature-extractor", "finetune", "inference", "growth")
PEERS = ("tutorial", "timm-train", "fastai", "ultralytics")
SHARE_OF_VAL = 0.39  # of generated images, as in the tutorial's data


def main() -> None:
    options = _options()
    with _workspace(options.work) as work:
        setting = _setting(options, work)
        groups = list(_groups(options, setting))
        records = Records(options.results, _told(options))
        for group in groups:
            take_turns(group, setting, 1 if group.kind == "growth" else options.rounds, records)
        text = _report(groups, records, setting, options)
    print(text)
    if options.document:
        fill(DOCUMENT, "table", text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="has train/<class>/ and val/<class>/")
    parser.add_argument("--images", type=int, default=397, help="generated ones, without --data")
    parser.add_argument("--architecture", default="resnet18", help="with random weights, for speed")
    parser.add_argument("--weights", type=Path, help="a timm folder, for accuracy")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=25, help="in feature-extractor mode")
    parser.add_argument("--finetune-epochs", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of measurements")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--copies", type=int, default=10, help="of each image, for predict")
    parser.add_argument("--growth", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--work", type=Path, help="where to write, instead of a temporary folder")
    parser.add_argument("--results", type=Path, help="JSON lines, to go on after an interruption")
    parser.add_argument("--document", action="store_true", help="fill docs/benchmarks.md")
    return parser.parse_args()


@contextmanager
def _workspace(chosen: Path | None) -> Iterator[Path]:
    if chosen:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.resolve()
    else:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)


def _setting(options: argparse.Namespace, work: Path) -> Setting:
    data = options.data or work / "data"
    if not data.exists():
        val = round(options.images * SHARE_OF_VAL)
        draw_images(data / "train", options.images - val, seed=0)
        draw_images(data / "val", val, seed=1)
    folder = work / options.architecture
    if not folder.exists():
        random_weights(folder, options.architecture)
    networks = {f"{options.architecture}, random weights": folder}
    if options.weights:
        networks[options.weights.name] = options.weights.resolve()
    same = (
        "size",
        "batch_size",
        "epochs",
        "finetune_epochs",
        "device",
        "bf16",
        "threads",
        "copies",
    )
    return Setting(
        data.resolve(), work, networks, **{name: getattr(options, name) for name in same}
    )


def _groups(options: argparse.Namespace, setting: Setting) -> Iterator[Group]:
    for network in setting.networks:
        for frozen, kind in ((True, "feature-extractor"), (False, "finetune")):
            if kind in options.kinds:
                yield training(setting, network, frozen, options.peers)
    if "inference" in options.kinds:
        for network in setting.networks:
            yield from inference(setting, network)
    if "growth" in options.kinds:
        yield from growth(setting, tuple(options.growth))


class Records:
    """What was measured so far; kept in a file if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, object]) -> None:
        self.path, self.all = path, []
        if path and path.exists():
            first, *self.all = map(json.loads, path.read_text().splitlines())
            if first != settings:
                sys.exit(f"{path} holds results of other settings: {first}")
        elif path:
            path.write_text(json.dumps(settings) + "\n")

    def add(self, record: Record) -> None:
        self.all.append(record)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def of(self, group: Group) -> Results:
        own = [r for r in self.all if r["group"] == [group.kind, group.network]]
        return Results(group, own)


def _told(options: argparse.Namespace) -> dict[str, object]:
    """The settings that results depend on."""
    free = {"rounds", "kinds", "peers", "growth", "work", "results", "document"}
    return {k: str(v) for k, v in vars(options).items() if k not in free}


def take_turns(group: Group, setting: Setting, rounds: int, records: Records) -> None:
    """Measure what is not in `records` yet; a row that is absent once is not tried again."""
    for number in range(rounds):
        for row in group.rows:
            found = records.of(group)
            done = any(r["row"] == row.name and r["round"] == number for r in found.records)
            if not done and not found.why_absent(row.name):
                key = {"group": [group.kind, group.network], "row": row.name, "round": number}
                record = key | result_of(row, setting)
                print(*(f"{k}: {v}" for k, v in record.items()), sep="; ", file=sys.stderr)
                records.add(record)


def result_of(row: Row, setting: Setting) -> Record:
    if row.absent:
        return {"absent": row.absent}
    try:
        row.before()
        measured = measure(row.command, setting.environment)
    except FailedError as error:
        return {"absent": f"failed: {error}"}
    return row.read(measured.out) | {
        "seconds": measured.seconds,
        "memory": measured.memory,
        "gpu_memory": measured.gpu_memory if setting.device == "cuda" else None,
    }


def _report(
    groups: list[Group], records: Records, setting: Setting, options: argparse.Namespace
) -> str:
    train, val = (len(list((setting.data / part).glob("*/*"))) for part in ("train", "val"))

    def bound(views: int) -> float:
        return setting.epochs * (train + val) / (views * train + val)

    parts = [_conditions(setting, options, train, val)]
    for group in groups:
        found = records.of(group)
        if not found.records:
            continue
        parts.append(f"### {group.kind}: {group.network}")
        parts.append(
            growth_table(found)
            if group.kind == "growth"
            else table(found, bound if group.kind == "feature-extractor" else None)
        )
        if group.kind == "finetune":
            parts.append("\n".join(limit_lines(found)))
    parts += ["### Targets", targets([records.of(g) for g in groups], bound, setting.epochs)]
    return "\n\n".join(filter(None, parts))


def _conditions(setting: Setting, options: argparse.Namespace, train: int, val: int) -> str:
    what = options.data.name if options.data else "generated images"
    versions = environment(torch.device(setting.device))
    peers = {name: _version(name) for name in ("fastai", "ultralytics")}
    shown = ", ".join(f"{k} {v}" for k, v in (versions | peers).items() if k != "threads")
    return (
        f"{what}: {train} images to train on, {val} to validate; {setting.size} px, batches of "
        f"{setting.batch_size}, {setting.epochs} epochs in feature-extractor mode and "
        f"{setting.finetune_epochs} in finetune mode; {'bf16' if setting.bf16 else 'float32'}; "
        f"{setting.threads} threads.\n\n"
        f"{machine()}; {shown}."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
