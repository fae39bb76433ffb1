"""Break training in every way that is known, resume it, and compare what comes out, byte for byte.

    python -m tools.faults --kills 60        fills docs/reliability.md

Training runs in forked processes, so that none of them loads torch again. A kill is SIGKILL at a
random instant between the start of the command and the time that the whole training takes.
"""

import argparse
import gc
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnnft.cli import main as cnnft
from cnnft.inference.predict import collect
from cnnft.machine.files import write_whole
from cnnft.runs.run import Run
from cnnft.training.step import train
from tools.document import fill
from tools.each_step import children, start_torchrun

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"

COMMON = (
    "--backbone=builtin", "--epochs=3", "--batch-size=6", "--image-size=64", "--device=cpu",
    "--checkpoint-every=1", "--name=run",
)  # fmt: skip
MATRIX: dict[str, tuple[str, ...]] = {
    "finetune, probe first": ("--workers=0",),
    "two workers": ("--workers=2",),
    "feature-extractor": ("--workers=0", "--mode=feature-extractor"),
    "accumulation, dropout": ("--workers=0", "--micro-batch=2", "--dropout=0.5"),
    "layer decay, tolerance": ("--workers=0", "--layer-decay=0.5", "--skip-nonfinite=3"),
    "adamw, plateau, warm-up": (
        "--workers=0", "--optimizer=adamw", "--weight-decay=0.05", "--schedule=plateau",
        "--warmup-epochs=0.5",
    ),
    "average of weights": ("--workers=0", "--ema=0.9", "--clip-grad=1"),
    "last epochs averaged": ("--workers=0", "--swa=2", "--batchnorm=train"),
    "snapshot ensemble": ("--workers=0", "--schedule=cosine-restarts", "--snapshots=3"),
    "new statistics, balanced": (
        "--workers=0", "--recalibrate-bn", "--batchnorm=train", "--sampling=balanced",
    ),
}  # fmt: skip
"""What holds state while training joins here, in one line."""

DETERMINED = ("model.safetensors", "config.json", "metrics.json", "predictions.csv", "data.csv")
"""Files of a run that hold nothing else."""

PHASES = ("preparing", "training", "evaluating", "writing")


def draw_data(folder: Path) -> Path:
    """Two classes of 12 images of noise, one brighter than the other."""
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for n in range(12):
            noise = np.random.default_rng([label, n]).integers(0, 200, (40, 50, 3)) + 50 * label
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{n}.png")
    return folder


# ---------------------------------------------------------------- one training, in a process


class Phase:
    """What a forked process is doing, seen from outside."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 1)

    def __str__(self) -> str:
        return PHASES[self.shared[0]]

    def during(self, function: Callable[..., object], phase: str) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            before, self.shared[0] = self.shared[0], PHASES.index(phase)
            result = function(*arguments, **options)
            self.shared[0] = before
            return result

        return wrapped

    def watch(self) -> None:
        self.shared[0] = PHASES.index("preparing")
        import_module("cnnft.training.finetune")  # so that `replace` meets all that trains
        replace(collect, self.during(collect, "evaluating"))
        replace(write_whole, self.during(write_whole, "writing"))

        def training(*arguments: object) -> object:
            self.shared[0] = PHASES.index("training")
            return train(*arguments)

        replace(train, training)


def replace(function: Callable[..., object], by: Callable[..., object]) -> None:
    """In every module of cnnft that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cnnft.") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, by)


@dataclass
class Training:
    """A command in a forked process; what it says lands in `said`."""

    pid: int
    phase: Phase
    said: Path

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Its exit code, negative for a signal; None if it runs on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self) -> str:
        """SIGKILL; what it was doing."""
        phase = str(self.phase)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return phase


def start(
    arguments: list[str], runs: Path, before: Callable[[], object] = lambda: None
) -> Training:
    runs.mkdir(exist_ok=True)
    phase, said = Phase(), runs / "said.txt"
    pid = os.fork()
    if pid:
        return Training(pid, phase, said)
    gc.freeze()  # what this process inherits may wait, when it dies, for threads that are not here
    try:
        os.setsid()
        with said.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's are not
        torch.set_num_threads(1)
        phase.watch()
        before()
        cnnft(["finetune", *arguments])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(70)


def begin(data: Path, runs: Path, options: tuple[str, ...]) -> list[str]:
    """The command that starts the run, or that resumes it."""
    if (runs / "run" / "config.toml").exists():
        return ["--resume", str(runs / "run")]
    shutil.rmtree(runs / "run", ignore_errors=True)  # killed before it was a run
    return [str(data), *COMMON, *options, "--runs-dir", str(runs)]


def outcome(runs: Path) -> dict[str, bytes]:
    """All that training determines: weights, momentum, history, metrics, predictions, images."""
    found = Run(runs / "run")
    saved = found.load_checkpoint()
    assert saved is not None
    files = {name: (found.path / name).read_bytes() for name in DETERMINED}
    tensors = {name: tensor.numpy().tobytes() for name, tensor in saved.tensors.items()}
    rows = [line.split(",") for line in (found.path / "history.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    history = repr([(*row[:seconds], *row[seconds + 1 :]) for row in rows]).encode()
    return files | tensors | {"history": history, "step": str(saved.step).encode()}


def bytes_lost(expected: dict[str, bytes], found: dict[str, bytes]) -> int:
    """Bytes that differ between two outcomes."""
    lost = 0
    for name in expected.keys() | found.keys():
        one, other = expected.get(name, b""), found.get(name, b"")
        if one != other:
            lost += abs(len(one) - len(other)) + sum(
                a != b for a, b in zip(one, other, strict=False)
            )
    return lost


# ---------------------------------------------------------------- kills


@dataclass
class Killed:
    phases: Counter[str]
    bytes_lost: int


def kill_and_resume(
    data: Path, folder: Path, options: tuple[str, ...], kills: int, chance: random.Random
) -> Killed:
    """Kill one training `kills` times, resume it each time, and compare it with a whole one."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder).mkdir()
    began = time.monotonic()
    whole = start(begin(data, folder / "whole", options), folder / "whole")
    code = whole.wait()
    assert code == 0, whole.said.read_text()
    takes, expected = time.monotonic() - began, outcome(folder / "whole")
    killed = Killed(Counter(), 0)
    runs = folder / "killed"
    while killed.phases.total() < kills:
        training = start(begin(data, runs, options), runs)
        code = training.wait(chance.uniform(0, takes))
        if code is None:
            killed.phases[training.kill()] += 1
            continue
        assert code == 0, training.said.read_text()
        killed.bytes_lost += bytes_lost(expected, outcome(runs))
        shutil.rmtree(runs / "run")  # it got through: kill another one
    last = start(begin(data, runs, options), runs)
    code = last.wait()
    assert code == 0, last.said.read_text()
    killed.bytes_lost += bytes_lost(expected, outcome(runs))
    left = list((runs / "run").rglob(".*"))
    assert not left, left
    return killed


# ---------------------------------------------------------------- other faults


def limit_writing(size: int) -> None:
    """No file may grow beyond `size` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def damage(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def stop_inside(training: Training, runs: Path, checkpoints_seen: int = 2) -> None:
    """Wait until there are checkpoints, then kill."""
    while len(list((runs / "run" / "state").glob("*.safetensors"))) < checkpoints_seen:
        assert training.wait(0.01) is None, training.said.read_text()
    training.kill()


@dataclass
class Fault:
    name: str
    tries: int
    survived: int = 0
    bytes_lost: int = 0
    said: str = ""


def other_faults(data: Path, folder: Path, tries: int, chance: random.Random) -> list[Fault]:
    options = MATRIX["finetune, probe first"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    whole = start(begin(data, folder / "whole", options), folder / "whole")
    assert whole.wait() == 0, whole.said.read_text()
    expected, runs = outcome(folder / "whole"), folder / "runs"
    largest = max(p.stat().st_size for p in (folder / "whole" / "run").rglob("*") if p.is_file())

    def last_line(training: Training) -> str:
        return training.said.read_text().strip().splitlines()[-1]

    def finish(fault: Fault) -> None:
        training = start(begin(data, runs, options), runs)
        if training.wait() == 0:
            fault.bytes_lost += bytes_lost(expected, outcome(runs))
            fault.survived += 1

    faults = []
    full = Fault("no space left while writing", tries)
    for _ in range(tries):
        shutil.rmtree(runs, ignore_errors=True)
        size = chance.randrange(1, largest)
        training = start(begin(data, runs, options), runs, lambda size=size: limit_writing(size))
        assert training.wait() == 1, training.said.read_text()
        full.said = last_line(training)
        finish(full)
    faults.append(full)

    damaged = Fault("newest checkpoint cut or one bit flipped", tries)
    for _ in range(tries):
        shutil.rmtree(runs, ignore_errors=True)
        stop_inside(start(begin(data, runs, options), runs), runs)
        damage(max((runs / "run" / "state").glob("*.safetensors")), chance)
        finish(damaged)
        damaged.said = next(
            line for line in (runs / "said.txt").read_text().splitlines() if "damaged" in line
        )
    faults.append(damaged)

    worker = Fault("a process that loads images dies", tries)
    with_workers = MATRIX["two workers"]
    for _ in range(tries):
        shutil.rmtree(runs, ignore_errors=True)
        training = start(begin(data, runs, with_workers), runs)
        while len(list((runs / "run" / "state").glob("*.safetensors"))) < 2:
            assert training.wait(0.01) is None, training.said.read_text()
        for child in children(training.pid):
            os.kill(child, signal.SIGKILL)
        if training.wait() == 1:  # it may have been done with its workers
            worker.said = last_line(training)
        finish(worker)
    faults.append(worker)

    changed = Fault("an image changes under the run", 1)
    shutil.rmtree(runs, ignore_errors=True)
    stop_inside(start(begin(data, runs, options), runs), runs)
    image = next(data.rglob("*.png"))
    kept = image.read_bytes()
    Image.new("RGB", (40, 50)).save(image)
    training = start(begin(data, runs, options), runs)
    assert training.wait() == 1, training.said.read_text()
    changed.said = last_line(training)
    image.write_bytes(kept)
    finish(changed)
    faults.append(changed)

    readonly = Fault("a place that cannot be written to", 1)
    training = start([str(data), *COMMON, *options, "--runs-dir", "/proc/runs"], runs)
    assert training.wait() == 1, training.said.read_text()
    readonly.said, readonly.survived = last_line(training), 1
    faults.append(readonly)
    return faults


def killed_under_torchrun(data: Path, folder: Path, kills: int, chance: random.Random) -> Fault:
    """Kill one of two processes as often; torchrun starts both again, and they resume."""
    fault = Fault("one of two processes under torchrun dies", kills)
    command = ["-m", "cnnft", "finetune", data, *COMMON, "--workers=0", "--epochs=20", "--runs-dir"]
    _, said = (whole := start_torchrun(2, *command, folder / "whole")).communicate()
    assert whole.returncode == 0, said
    expected, runs = outcome(folder / "whole"), folder / "killed"
    training = start_torchrun(2, f"--max-restarts={kills}", *command, runs)
    for _ in range(kills):
        before = reached(runs)
        while reached(runs) == before:  # it goes on from where it was
            assert training.poll() is None, training.communicate()
            time.sleep(0.01)
        os.kill(chance.choice(children(training.pid)), signal.SIGKILL)
    _, said = training.communicate()
    assert training.returncode == 0, said
    fault.survived = kills
    fault.bytes_lost = bytes_lost(expected, outcome(runs))
    return fault


def reached(runs: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in (runs / "run" / "state").glob("*.safetensors")]
    return max((int(name.split("-")[0]) for name in names), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all, over the lines of MATRIX")
    parser.add_argument("--tries", type=int, default=10, help="of each other fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        data = draw_data(Path(place) / "data")
        share, rows = -(-options.kills // len(MATRIX)), []
        for name, flags in MATRIX.items():
            killed = kill_and_resume(data, Path(place) / "kills", flags, share, chance)
            counts = [str(killed.phases[phase]) for phase in PHASES]
            rows.append([name, str(killed.phases.total()), *counts, str(killed.bytes_lost)])
            print(*rows[-1], flush=True)
        sums = [sum(int(row[i]) for row in rows) for i in range(1, len(rows[0]))]
        rows.append(["**all**", *map(str, sums)])
        header = [
            "training",
            "killed",
            *(f"while {phase}" for phase in PHASES),
            "bytes that differ",
        ]
        fill(DOCUMENT, "kills", table(header, rows) + f"\n\nSeed {options.seed}.")
        faults = other_faults(data, Path(place) / "faults", options.tries, chance)
        faults.append(killed_under_torchrun(data, Path(place) / "many", 3, chance))
        lines = [
            [
                fault.name, str(fault.tries), str(fault.survived), str(fault.bytes_lost),
                fault.said.replace(place, "…").replace("|", "\\|"),
            ]
            for fault in faults
        ]  # fmt: skip
        header = ["fault", "tries", "survived", "bytes that differ", "what is said"]
        fill(DOCUMENT, "faults", table(header, lines))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
