"""A model of a run: sequences of commands and faults, drawn by hypothesis, and what must hold after
each.

    python -m tools.states [--minutes 30] [--seed N]

docs/results/states.json has the sum over all such commands, docs/reliability.md its table; it may
be interrupted at any time. `tests/test_states.py` draws a few in every run of the test suite.

Faults come at a file operation, not at an instant, so that hypothesis can repeat and shorten what
fails. A finding prints the sequence; the same seed finds it again.
"""

import argparse
import csv
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cnnft.inference.predict import Inference, predict
from cnnft.inference.storage import load, read_tensors
from cnnft.machine.files import parse_json
from cnnft.runs.predictions import predictions_from_csv
from cnnft.runs.run import Run
from tools.document import fill
from tools.faults import limit_writing
from tools.forked import (
    DETERMINED,
    Command,
    bytes_lost,
    cache_content,
    draw_data,
    make_backbone,
    run_content,
    start,
    unfinished,
)
from tools.tally import DOCUMENT, Tally, table

KINDS = {
    "finetune": ("--cache=off", "--mode=finetune"),
    "feature-extractor": ("--mode=feature-extractor", "--head-solver=sgd", "--cache=disk"),
    "snapshots, pixels on disk": (
        "--no-probe-first", "--cache=disk", "--schedule=cosine-restarts", "--snapshots=2",
    ),
}  # fmt: skip

_MOST_RUNS = 3
_LOGS, _LARGEST = 8_000, 35_000
"""Bytes: what a command prints, into a file too, and the largest file of a run."""
_COUNTED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "shutil.rmtree")
"""Audit events at which a fault may come."""


@dataclass(frozen=True)
class Fault:
    """What happens to a command, at this share of its file operations."""

    kind: str
    at: float

    def prepare(self, world: Path, operations: int) -> None:
        """In the command's process."""
        if self.kind == "full disk":
            limit_writing(int(_LOGS + self.at * _LARGEST))
            return
        number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[self.kind]
        left = int(self.at * operations)

        def act() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

        at_operations(world, act)


FAULTS = st.one_of(
    st.none(), st.builds(Fault, st.sampled_from(("kill", "kill", "terminate", "full disk")),
    st.floats(0, 1, exclude_min=True)),
)  # fmt: skip
ENDED = {"kill": (-9,), "terminate": (-15, 143), "full disk": (1,)}
"""Exit codes by which a fault may end a command; it may also get through."""


# ---------------------------------------------------------------- the world


class World:
    """A folder of images, runs, caches, and what is around them; and what each kind ends with."""

    def __init__(self, folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> None:
        self.folder, self.kinds = folder.resolve(), kinds
        self.places = (self.folder / "photos", self.folder / "attic" / "photos")
        self.runs = (self.folder / "runs", self.folder / "shelf")
        self.cache, self.out = self.folder / "cache", self.folder / "out"
        self.backbone = make_backbone(self.folder / "tiny")
        for place in (*self.runs, self.out, self.folder / "attic"):
            place.mkdir()
        self.data = draw_data(self.places[0], images=6)
        self.images = contents(self.data)
        self.operations: dict[str, int] = {}
        self.expected: dict[str, dict[str, bytes]] = {}
        self.answers: dict[tuple[object, ...], object] = {}
        """What a command says of a finished run of a kind."""
        self.cached: dict[str, bytes] = {}
        for kind in kinds:
            self._train_undisturbed(kind)

    def _train_undisturbed(self, kind: str) -> None:
        self.empty()
        counts = mmap.mmap(-1, 1 << 16)
        command = self.command(self.finetune(kind, "whole"), counts=counts)
        assert command.wait() == 0, command.said
        run = self.runs[0] / "whole"
        require_described(Run(run), self.data)
        self.operations[kind] = counts.rfind(b"\1") + 1
        self.expected[kind] = self.content(run)
        self.cached |= cache_content(self.cache)

    def empty(self) -> None:
        """As at the beginning."""
        for place in self.places:
            if place.exists() and place != self.places[0]:
                place.rename(self.places[0])
        self.data = self.places[0]
        for place in (*self.runs, self.cache, self.out, self.folder / "home", self.folder / "tmp"):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()

    def finetune(self, kind: str, name: str) -> list[str]:
        return [
            "finetune", str(self.data), f"--backbone=local-dir:{self.backbone}", "--epochs=2",
            "--batch-size=6", "--image-size=32", "--device=cpu", "--checkpoint-every=1",
            "--workers=0", f"--runs-dir={self.runs[0]}", f"--name={name}", *KINDS[kind],
        ]  # fmt: skip

    def command(
        self, arguments: list[str], fault: Fault | None = None, kind: str = "", number: int = 0,
        counts: mmap.mmap | None = None,
    ) -> Command:  # fmt: skip
        """Started with a home, a folder for temporary files, and caches of its own."""
        environment = {"HOME": "home", "TMPDIR": "tmp", "CNNFT_CACHE": "cache"}
        environment = {name: str(self.folder / place) for name, place in environment.items()}

        def prepare() -> None:
            tempfile.tempdir = None  # which this process has asked for
            os.chdir(self.folder)
            if fault is not None:
                fault.prepare(self.folder, self.operations[kind])
            if counts is not None:
                at_operations(self.folder, lambda: counts.write_byte(1))

        return start(arguments, self.folder / f"said{number}", environment, prepare)

    def content(self, run: Path) -> dict[str, bytes]:
        """What training determines, wherever the images lie."""
        places = sorted(map(str, self.places), key=len, reverse=True)
        found = run_content(run)
        for name in ("data.csv", "predictions.csv"):
            for place in places:
                found[name] = found[name].replace(place.encode(), b"DATA")
        return found

    def around(self, but: Iterable[Path]) -> dict[str, tuple[int, int]]:
        """Size and time of every file that a command must leave alone."""
        mine = [*but, self.cache, self.out, *self.folder.glob("said*")]
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.folder.rglob("*")
            if path.is_file() and not any(path.is_relative_to(place) for place in mine)
        }


def at_operations(world: Path, act: Callable[[], object]) -> None:
    """In a command's process: call `act` at every operation on a file of the world."""
    inside = str(world)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _COUNTED and str(arguments[0]).startswith(inside):
            act()

    sys.addaudithook(hook)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- what a run must be like

READERS: dict[str, Callable[[Run], object]] = {
    "config.toml": Run.config,
    "config.json": Run.description,
    "model.safetensors": lambda run: read_tensors(run.path / "model.safetensors"),
    "metrics.json": Run.metrics,
    "metrics.jsonl": Run.history,
    "history.csv": lambda run: list(csv.DictReader((run.path / "history.csv").open())),
    "predictions.csv": lambda run: run._read("predictions.csv", predictions_from_csv),
    "environment.json": Run.environment,
    "data.csv": Run.images,
    "formats.json": lambda run: parse_json((run.path / "formats.json").read_bytes(), run.path),
    "run.log": lambda run: run.log.read_text(encoding="utf-8"),
}


def require_parsed(run: Run) -> None:
    """Every file of the run is whole; what a killed process left beside them is hidden."""
    for path in run.path.iterdir():
        if path.is_file() and not path.name.endswith(".unfinished"):
            READERS[path.name](run)
    for path in (run.path / "snapshots").glob("[!.]*"):
        read_tensors(path)
    newest = max((run.path / "state").glob("[0-9]*.safetensors"), default=None)
    if newest is not None:
        saved = run.load_checkpoint()
        assert saved is not None and newest.name.startswith(f"{saved.step:010d}-")


def is_described(run: Run, data: Path) -> bool:
    """Whether its weights give the scores and logits that stand beside them."""
    samples = run.images()["val"]
    paths = tuple(str(data.joinpath(*Path(path).parts[-2:])) for path in samples.paths)
    samples = replace(samples, paths=paths)
    metrics, kept = run.metrics(), run._read("predictions.csv", predictions_from_csv)
    found = predict(load(run.path, device="cpu"), samples, Inference(workers=0), "val")
    score = found.score()
    assert kept.samples.hashes == samples.hashes
    same = (score.n, score.correct) == (metrics.val.n, metrics.val.correct)
    close = abs(score.loss - metrics.val.loss) < 1e-4
    return same and close and bool((found.logits - kept.logits).abs().max() < 1e-3)


def require_described(run: Run, data: Path) -> None:
    assert is_described(run, data), f"{run.path}: its weights are not those of its metrics"


# ---------------------------------------------------------------- the machine


class RunMachine(RuleBasedStateMachine):
    """Commands on a few runs. `world` is made once, for all sequences."""

    world: World
    count: Callable[[str], object] = staticmethod(lambda what: None)

    def __init__(self) -> None:
        super().__init__()
        self.world.empty()
        self.kinds: dict[Path, str] = {}
        self.finished: set[Path] = set()
        self.begun = 0

    # ------------------------------------------------------------ commands

    def _execute(
        self, arguments: list[str], fault: Fault | None = None, kind: str = "",
        writes: Iterable[Path] = (), allowed: Collection[int] = (0,),
    ) -> Command:  # fmt: skip
        """One command, to its end; nothing but `writes` may change. Without a fault, which may end
        it otherwise, it ends with one of the `allowed` exit codes.
        """
        around = self.world.around(writes)
        command = self.world.command(arguments, fault, kind)
        code = command.wait()
        command.require_end()
        said = command.said
        assert code in allowed or (fault and code in ENDED[fault.kind]), (code, said)
        assert "Traceback" not in said and "this is a bug" not in said, said
        changed = self.world.around(writes).items() ^ around.items()
        assert not changed, f"something else changed: {sorted(changed)}"
        self._require_clean()
        what = arguments[0] if "--resume" not in " ".join(arguments) else "resume"
        self.count(what)
        if fault is not None and code != 0:
            self.count(fault.kind)
        return command

    def _require_clean(self) -> None:
        world = self.world
        assert contents(world.data) == world.images, "the images changed"
        for place in ("home", "tmp"):
            left = list((world.folder / place).rglob("*"))
            assert not left, f"left in {place}: {left}"
        found = cache_content(world.cache)
        known = {name: world.cached.get(name, b"") for name in found}
        assert bytes_lost(known, found) == 0, "the cache holds something else"
        for path in self.kinds:
            if (path / "config.toml").exists():
                require_parsed(Run(path))

    def _require_finished(self, path: Path) -> None:
        world, kind = self.world, self.kinds[path]
        lost = bytes_lost(world.expected[kind], world.content(path))
        assert lost == 0, f"{lost} bytes of {path} differ from the undisturbed run"
        assert not unfinished(path), unfinished(path)
        self.finished.add(path)

    def _after_training(self, path: Path, command: Command) -> None:
        if command.code == 0:
            self._require_finished(path)
        elif not (path / "config.toml").exists():  # it was not a run yet
            shutil.rmtree(path, ignore_errors=True)
            del self.kinds[path]
        elif all((path / name).exists() for name in DETERMINED):
            require_described(Run(path), self.world.data)

    def _kind(self, draw: int) -> str:
        return self.world.kinds[draw % len(self.world.kinds)]

    def _choose(self, among: Iterable[Path], draw: int) -> Path:
        paths = sorted(among)
        return paths[draw % len(paths)]

    # ------------------------------------------------------------ rules

    @precondition(lambda self: len(self.kinds) < _MOST_RUNS)
    @rule(which=st.integers(0, 5), fault=FAULTS)
    def finetune(self, which: int, fault: Fault | None) -> None:
        kind = self._kind(which)
        self.begun += 1
        path = self.world.runs[0] / f"run{self.begun}"
        self.kinds[path] = kind
        arguments = self.world.finetune(kind, path.name)
        self._after_training(path, self._execute(arguments, fault, kind, [path]))

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5), fault=FAULTS)
    def resume(self, which: int, fault: Fault | None) -> None:
        path = self._choose(self.kinds, which)
        arguments = ["finetune", f"--resume={path}"]
        if str(self.world.data) != Run(path).config().dataset.data:
            arguments.append(str(self.world.data))
        command = self._execute(arguments, fault, self.kinds[path], [path])
        self._after_training(path, command)

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5))
    def resume_twice_at_once(self, which: int) -> None:
        path = self._choose(self.kinds, which)
        arguments = ["finetune", f"--resume={path}", str(self.world.data)]
        commands = [self.world.command(arguments, number=number) for number in range(2)]
        for command in commands:
            command.wait()
            command.require_end()
            refused = "is being trained by another process" in command.said
            assert command.code == 0 or (command.code == 1 and refused), command.said
        assert 0 in [command.code for command in commands]
        self._require_clean()
        self._require_finished(path)
        self.count("twice at once")

    @precondition(lambda self: len(self.kinds) < _MOST_RUNS - 1)
    @rule(which=st.integers(0, 5))
    def begin_one_name_twice_at_once(self, which: int) -> None:
        kind = self._kind(which)
        self.begun += 1
        path = self.world.runs[0] / f"run{self.begun}"
        both = (path, path.with_name(f"{path.name}-2"))
        arguments = self.world.finetune(kind, path.name)
        commands = [self.world.command(arguments, number=number) for number in range(2)]
        for command in commands:
            assert command.wait() == 0, command.said
            command.require_end()
        self.kinds |= dict.fromkeys(both, kind)
        self._require_clean()
        for one in both:
            self._require_finished(one)
        self.count("twice at once")

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5), to=st.sampled_from((0, 1)))
    def move_run(self, which: int, to: int) -> None:
        path = self._choose(self.kinds, which)
        self.begun += 1
        new = path.rename(self.world.runs[to] / f"moved {self.begun}")
        self.kinds[new] = self.kinds.pop(path)
        if path in self.finished:
            self.finished.remove(path)
            self.finished.add(new)
        self.count("move a run")

    @precondition(lambda self: self.kinds)
    @rule()
    def move_data(self) -> None:
        world = self.world
        world.data = world.data.rename(world.places[world.data == world.places[0]])
        self.count("move data")

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5))
    def resume_without_saying_where(self, which: int) -> None:
        """The images are found, or the command refuses and the run stays as it was."""
        path = self._choose(self.kinds, which)
        before = contents(path)
        command = self.world.command(["finetune", f"--resume={path}"])
        command.wait()
        command.require_end()
        self._require_clean()
        if command.code == 0:
            self._require_finished(path)
        else:
            assert "its images are not in" in command.said, command.said
            assert contents(path) == before
        self.count("resume")

    def _answer(
        self, path: Path, arguments: list[str], fault: Fault | None, written: str | None = None
    ) -> Command | None:
        """A command that reads the run; None where its run was not finished, and it said so."""
        kind, out = self.kinds[path], self.world.out
        shutil.rmtree(out)
        out.mkdir()
        finished = path in self.finished
        if finished:
            command = self._execute(arguments, fault, kind)
        else:  # it answers, or refuses in a sentence
            command = self._execute(arguments, allowed=(0, 1, 2))
        if written is not None and command.code != 0:
            assert not (out / written).exists(), "a file that is not whole"
        if not finished or command.code != 0:
            return None
        answer = (out / written).read_bytes() if written is not None else command.result
        key = (kind, arguments[0], written, self.world.data)
        known = self.world.answers.setdefault(key, answer)
        assert answer == known, f"{arguments[0]} answers otherwise than before"
        return command

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5))
    def evaluate(self, which: int) -> None:
        path = self._choose(self.kinds, which)
        arguments = ["evaluate", str(self.world.data), f"--model={path}", "--json", "--workers=0"]
        command = self._answer(path, arguments, None)
        if command is not None:
            found, metrics = json.loads(command.result), Run(path).metrics()
            assert (found["n"], found["correct"]) == (metrics.val.n, metrics.val.correct)
            assert abs(found["loss"] - metrics.val.loss) < 1e-4
            assert found["left_out"] == metrics.train.n

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5), fault=FAULTS)
    def predict(self, which: int, fault: Fault | None) -> None:
        path = self._choose(self.kinds, which)
        arguments = ["predict", str(self.world.data), f"--model={path}", "--workers=0"]
        output = self.world.out / "answers.csv"
        command = self._answer(path, [*arguments, f"--output={output}"], fault, output.name)
        if command is not None:
            assert len(output.read_text().splitlines()) == 1 + len(self.world.images)

    @precondition(lambda self: self.kinds)
    @rule(which=st.integers(0, 5), fault=FAULTS, format=st.sampled_from(("safetensors", "head")))
    def export(self, which: int, fault: Fault | None, format: str) -> None:
        path = self._choose(self.kinds, which)
        exportable = {"snapshots, pixels on disk": (), "finetune": ("safetensors",)}
        output = self.world.out / f"model.{format}"
        arguments = ["export", str(path), f"--format={format}", f"--output={output}"]
        if format in exportable.get(self.kinds[path], (format,)):
            self._answer(path, arguments, fault, output.name)
        else:
            self._execute(arguments, allowed=(1, 2))
            assert not output.exists()

    @precondition(lambda self: cache_content(self.world.cache))
    @rule()
    def clear_the_cache(self) -> None:
        self._execute(["cache", "--clear"])
        assert not cache_content(self.world.cache)

    # ------------------------------------------------------------ the end

    def teardown(self) -> None:
        """Every run can be finished."""
        for path in sorted(self.kinds):
            arguments = ["finetune", f"--resume={path}", str(self.world.data)]
            command = self.world.command(arguments)
            assert command.wait() == 0, command.said
            command.require_end()
            self._require_finished(path)
            require_described(Run(path), self.world.data)
        self._require_clean()
        if self.begun:
            self.count("sequences")


# ---------------------------------------------------------------- the tool


def draw(
    world: World, examples: int, steps: int, number: int,
    count: Callable[[str], object] = lambda what: None,
) -> None:  # fmt: skip
    """So many sequences of so many steps."""

    class Machine(RunMachine):
        pass

    Machine.world, Machine.count = world, staticmethod(count)
    run_state_machine_as_test(
        seed(number)(Machine),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )  # fmt: skip


EXAMPLES = 20
"""Sequences that one seed of hypothesis gives."""
SHOWN = (
    *("finetune", "resume", "twice at once", "move a run", "move data", "evaluate", "predict"),
    *("export", "cache", "kill", "terminate", "full disk"),
)


def summary(tally: Tally) -> str:
    counts = sum(tally.sums().values(), Counter())
    rows = [[name, f"{counts[name]:,}"] for name in SHOWN]
    return (
        table(["command or fault", "times"], rows)
        + f"\n\n{counts['sequences']:,} sequences, {counts['findings']:,} findings."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="of each sequence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally, until = Tally("states", options.seed), time.monotonic() + 60 * options.minutes
    counts: Counter[str] = Counter()

    def count(what: str) -> None:
        counts[what] += 1
        if what == "sequences":
            tally.add({"sequences": counts})
            print(dict(counts), flush=True)
            counts.clear()

    try:
        with tempfile.TemporaryDirectory() as folder:
            world, number = World(Path(folder)), 1000 * options.seed
            while time.monotonic() < until:
                draw(world, EXAMPLES, options.steps, number, count)
                number += 1
    except AssertionError:
        tally.add({"sequences": {"findings": 1}})
        raise
    finally:
        fill(DOCUMENT, "states", summary(tally))


if __name__ == "__main__":
    main()
