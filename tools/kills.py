"""Kill commands at random instants, resume or repeat them, and compare the result byte for byte.

    python -m tools.kills [--kills 60] [--row NAME] [--seed N]

A kill is SIGKILL between the start of the command and the time that all of it takes. It counts when
what was killed got through in the end: docs/results/kills.json has the sum of all such commands,
docs/reliability.md its table. Interrupt it at any time; `--kills 0` writes the table alone.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnnft.cache import features
from cnnft.runs.directory import CONFIG
from tools.document import fill
from tools.forked import (
    GRACE,
    PHASES,
    Command,
    begin_or_resume,
    bytes_lost,
    cache_content,
    draw_data,
    ranks,
    run_content,
    start,
    unfinished,
)
from tools.tally import DOCUMENT, Tally, table

COMMON = (
    "--backbone=builtin", "--epochs=3", "--batch-size=6", "--image-size=64", "--device=cpu",
    "--checkpoint-every=1", "--name=run",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is killed. In its arguments {data}, {model} and {frozen} stand for paths."""

    arguments: tuple[str, ...]
    command: str = "finetune"
    processes: int = 1
    aim: str | None = None
    """Kill around this phase."""
    large: bool = False
    """Images that take a while to decode."""

    @property
    def trains(self) -> bool:
        return self.command == "finetune"


def alone(*arguments: str) -> Row:
    return Row(("--workers=0", *arguments))


MATRIX: dict[str, Row] = {
    "finetune, probe first": alone("--mode=finetune"),
    "two workers": Row(("--workers=2", "--mode=finetune")),
    "two processes": Row(("--workers=0", "--mode=finetune"), processes=2),
    "two processes, a worker each": Row(
        ("--workers=1", "--mode=feature-extractor", "--head-solver=sgd"), processes=2
    ),
    "feature-extractor": alone("--mode=feature-extractor", "--head-solver=sgd"),
    "feature-extractor, pixels": alone("--mode=feature-extractor",
    "--head-solver=sgd", "--mixup=0.2", "--cutmix=1"),
    "bn-only": alone("--mode=bn-only"),
    "mode auto": alone("--mode=auto", "--ensemble"),
    "a head that is solved": alone("--mode=feature-extractor"),
    "stages, from scratch": alone("--no-pretrained", "--head=mlp"),
    "accumulation, dropout": alone("--micro-batch=2", "--dropout=0.5", "--drop-path=0.2"),
    "layer decay, tolerance": alone("--layer-decay=0.5", "--skip-nonfinite=3"),
    "adamw, plateau, warm-up": alone(
        "--optimizer=adamw", "--weight-decay=0.05", "--schedule=plateau", "--warmup-epochs=0.5"
    ),
    "early stopping, focal loss": alone("--patience=1", "--focal=2", "--epochs=4"),
    "mixup, smoothing, weights": alone(
        "--mixup=0.2", "--label-smoothing=0.1", "--class-weights=balanced", "--augment=strong"
    ),
    "average of weights": alone("--ema=0.9", "--clip-grad=1"),
    "last epochs averaged": alone("--swa=2", "--batchnorm=train"),
    "snapshot ensemble": alone("--schedule=cosine-restarts", "--snapshots=3"),
    "running statistics, balanced": alone(
        "--no-recalibrate-bn", "--batchnorm=train", "--sampling=balanced"
    ),
    "distillation": alone("--teacher={model}"),
    "replacing a run (--force)": alone("--force", "--mode=finetune"),
    "feature cache being written": Row(
        ("--workers=0", "--mode=feature-extractor",
        "--head-solver=sgd", "--cache=disk"), aim="caching", large=True
    ),
    "pixel cache being written": Row(
        ("--workers=0", "--cache=disk", "--no-probe-first", "--epochs=2"),
        aim="caching", large=True,
    ),
    "predict --output": Row(
        ("{data}", "--model={model}", "--output=out.csv", "--workers=0"), "predict"
    ),
    "evaluate": Row(("{data}", "--model={model}", "--json", "--workers=1"), "evaluate"),
    "export": Row(("{model}", "--format=safetensors", "--output=out"), "export"),
    "export of a head": Row(("{frozen}", "--format=head", "--output=out"), "export"),
}  # fmt: skip
"""What holds state while training, and what writes a file, joins here in one line."""


class Subjects:
    """What the commands are about: images, and two runs; made once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.data = draw_data(folder / "data")
        self.large = draw_data(folder / "large", size=(500, 400))
        self.model = self._train(folder / "models", "model")
        self.frozen = self._train(
            folder / "models", "frozen", "--mode=feature-extractor", "--head-solver=sgd"
        )

    def _train(self, runs: Path, name: str, *more: str) -> Path:
        arguments = [*COMMON, "--workers=0", *more, f"--name={name}", f"--runs-dir={runs}"]
        command = start(["finetune", str(self.data), *arguments], runs)
        assert command.wait() == 0, command.said
        return runs / name


class Trial:
    """One row in a folder: the command that starts it or goes on with it, and what comes out."""

    def __init__(self, row: Row, subjects: Subjects, folder: Path) -> None:
        self.row, self.subjects, self.folder = row, subjects, folder
        self.run, self.cache = folder / "runs" / "run", folder / "cache"
        self.data = subjects.large if row.large else subjects.data
        self.begin_anew()

    def begin_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if "--force" in self.row.arguments:
            shutil.copytree(self.subjects.model, self.run)

    def arguments(self) -> list[str]:
        row, subjects = self.row, self.subjects
        given = [
            a.format(data=self.data, model=subjects.model, frozen=subjects.frozen)
            for a in row.arguments
        ]
        if not row.trains:
            return [row.command, *given]
        begin = [str(self.data), *COMMON, *given]
        config, replaced = self.run / CONFIG, subjects.model / CONFIG
        if config.exists() and config.read_bytes() == replaced.read_bytes():  # it is still that one
            return [row.command, *begin, f"--runs-dir={self.run.parent}"]
        return begin_or_resume(self.run, *begin)

    def start(self) -> list[Command]:
        """Of each process the command."""
        arguments = self.arguments()

        def prepare() -> None:
            os.chdir(self.folder)
            features.SAVE_EVERY = 0.0

        return [
            start(
                arguments,
                self.folder / f"rank{number}",
                {"CNNFT_CACHE": str(self.cache), **environment},
                prepare,
            )
            for number, environment in enumerate(ranks(self.row.processes))
        ]

    def content(self) -> dict[str, bytes]:
        if self.row.trains:
            return run_content(self.run) | cache_content(self.cache)
        if not list(self.folder.glob("out*")):
            return {"result": (self.folder / "rank0" / "result.txt").read_bytes()}
        return {path.name: path.read_bytes() for path in self.folder.glob("out*")}

    def require_whole(self, expected: dict[str, bytes]) -> None:
        """After a kill: what is there is whole, and what --force replaces is there."""
        for path in self.folder.glob("out*"):
            assert path.read_bytes() == expected[path.name], f"{path} is not whole"
        if "--force" in self.row.arguments:
            kept = (self.run, self.run.with_name(".run.replaced"))
            assert any((path / "model.safetensors").exists() for path in kept)

    def require_clean(self) -> None:
        """When it got through."""
        left = unfinished(self.run.parent)
        assert not left, left


def finish(commands: list[Command]) -> None:
    for command in commands:
        assert command.wait() == 0, "\n".join(c.said for c in commands)


def whole(trial: Trial) -> tuple[dict[str, bytes], tuple[float, float]]:
    """What comes out undisturbed, and between which seconds a kill falls."""
    began, seen = time.monotonic(), []
    (main, *_) = commands = trial.start()
    while main.wait(0.001) is None:
        if trial.row.aim in (None, str(main.phase)):
            seen.append(time.monotonic() - began)
    finish(commands)
    return trial.content(), (seen[0], seen[-1])


def kill_one(commands: list[Command], chance: random.Random) -> str:
    """One of the processes dies; torchrun ends the others. What it was doing."""
    victim = chance.choice(commands)
    phase = victim.kill()
    for other in commands:
        other.kill(signal.SIGTERM)
    for other in commands:
        if other.wait(GRACE) is None:
            other.kill()
    return phase


def kill_until(trial: Trial, kills: int, chance: random.Random) -> Callable[[], Counter[str]]:
    """Counts of at most so many kills of one command, until it got through; to be called again."""
    expected, window = whole(trial)

    def once() -> Counter[str]:
        trial.begin_anew()
        counts: Counter[str] = Counter()
        all_commands = []
        while counts["killed"] < kills:
            commands = trial.start()
            all_commands += commands
            if commands[0].wait(chance.uniform(*window)) is not None:
                break
            phase = kill_one(commands, chance)
            counts += Counter({"killed": 1, phase: 1})
            trial.require_whole(expected)
        else:
            commands = trial.start()
            all_commands += commands
        finish(commands)
        counts["bytes that differ"] = bytes_lost(expected, trial.content())
        trial.require_clean()
        for command in all_commands:
            command.require_end()
        return counts

    return once


AT_ONCE = 6
"""Kills of one command at most, so that an interruption of this tool loses few of its counts."""


def kill_and_repeat(
    row: Row, subjects: Subjects, folder: Path, kills: int, chance: random.Random,
    count: Callable[[Counter[str]], object],
) -> None:  # fmt: skip
    """Kill a row's command so many times in all; `count` gets the counts as they come."""
    once, done = kill_until(Trial(row, subjects, folder), min(kills, AT_ONCE), chance), 0
    while done < kills:
        counts = once()
        done += counts["killed"]
        count(counts)
    shutil.rmtree(folder)


def summary(tally: Tally) -> str:
    header = ["killed command", "kills", *(f"while {phase}" for phase in PHASES)]
    columns = ("killed", *PHASES, "bytes that differ")
    sums = tally.sums()
    ordered = {name: sums[name] for name in (*MATRIX, *sums) if name in sums}
    ordered["**all**"] = sum(sums.values(), Counter())
    rows = [[name, *(f"{n[column]:,}" for column in columns)] for name, n in ordered.items()]
    return table([*header, "bytes that differ"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="of each row")
    parser.add_argument("--row", choices=MATRIX, help="this one only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, tally = random.Random(options.seed), Tally("kills", options.seed)
    try:
        with tempfile.TemporaryDirectory() as place:
            subjects = Subjects(Path(place)) if options.kills else None
            rows = [options.row] if options.row else list(MATRIX)
            for name in rows if options.kills else ():

                def count(counts: Counter[str], name: str = name) -> None:
                    tally.add({name: counts})
                    print(name, dict(counts), flush=True)

                folder = Path(place) / "trial"
                kill_and_repeat(MATRIX[name], subjects, folder, options.kills, chance, count)
    finally:
        fill(DOCUMENT, "kills", summary(tally))


if __name__ == "__main__":
    main()
