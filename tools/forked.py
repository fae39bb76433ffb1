"""Commands of cnnft in forked processes, so that none loads torch again: watched, and killed.

What tools/kills.py, tools/faults.py and tools/states.py share.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import pkgutil
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import cnnft
from cnnft.cache import features, pixels
from cnnft.cli import main
from cnnft.inference.predict import collect
from cnnft.machine import distributed
from cnnft.machine.files import to_safetensors, whole_file
from cnnft.models.build import build
from cnnft.models.identity import Identity
from cnnft.runs.directory import CONFIG
from cnnft.runs.run import Run
from cnnft.training.step import train

DETERMINED = ("model.safetensors", "config.json", "metrics.json", "predictions.csv", "data.csv")
"""Files of a run that hold nothing but what its settings, images and seed determine."""

PHASES = ("preparing", "caching", "training", "evaluating", "writing")

GRACE = 10.0
"""Seconds in which the processes of a killed command are to end by themselves."""


def draw_data(folder: Path, images: int = 12, size: tuple[int, int] = (50, 40)) -> Path:
    """Two classes of images of noise, one brighter than the other."""
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for n in range(images):
            noise = np.random.default_rng([label, n]).integers(0, 200, (*size[::-1], 3))
            Image.fromarray((noise + 50 * label).astype(np.uint8)).save(folder / name / f"{n}.png")
    return folder


TINY = Identity("tiny", "timm", "resnet10t", model_args={"channels": [8, 8, 8, 8], "stem_width": 8})


def make_backbone(folder: Path) -> Path:
    """A small network of random weights in timm's folder layout, for `local-dir:`."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = build(TINY, 10)
    description = {
        "architecture": TINY.architecture,
        "num_classes": 10,
        "model_args": TINY.model_args,
        "pretrained_cfg": network.pretrained_cfg | {"input_size": [3, 32, 32], "tag": TINY.name},
    }
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "model.safetensors").write_bytes(to_safetensors(network.state_dict()))
    return folder


# ---------------------------------------------------------------- a command, in a process


class Phase:
    """What a forked process is doing, seen from outside."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 1)

    def __str__(self) -> str:
        return PHASES[self.shared[0]]

    @contextlib.contextmanager
    def being(self, phase: str) -> Iterator[None]:
        before = self.shared[0]
        if str(self) != "caching":  # which evaluates and writes
            self.shared[0] = PHASES.index(phase)
        yield
        self.shared[0] = before

    def during(self, function: Callable[..., object], phase: str) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            with self.being(phase):
                return function(*arguments, **options)

        return wrapped

    @contextlib.contextmanager
    def writing(self, path: Path, mode: int) -> Iterator[IO[bytes]]:
        with self.being("writing"), whole_file(path, mode) as file:
            yield file

    def watch(self) -> None:
        """In the forked process."""
        self.shared[0] = PHASES.index("preparing")
        replace(collect, self.during(collect, "evaluating"))
        replace(whole_file, self.writing)
        features.Features._save = self.during(features.Features._save, "caching")
        to_disk = pixels._to_disk

        def caching(images: pixels.CachedImages) -> Iterator[int]:
            with self.being("caching"):
                yield from to_disk(images)

        def training(*arguments: object) -> object:
            self.shared[0] = PHASES.index("training")
            return train(*arguments)

        pixels._to_disk = caching
        replace(train, training)


def load_all() -> None:
    """So that no forked process has to, and `replace` meets all."""
    for module in pkgutil.walk_packages(cnnft.__path__, "cnnft."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("torchmetrics.functional")  # and matplotlib, which caches its fonts


def replace(function: Callable[..., object], by: Callable[..., object]) -> None:
    """In every module of cnnft that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cnnft.") and getattr(module, function.__name__, None) is function:
            setattr(module, function.__name__, by)


@dataclass
class Command:
    """A command in a forked process, the first of its session; what it prints lands in files."""

    pid: int
    phase: Phase
    folder: Path
    code: int | None = None

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="backslashreplace")

    @property
    def result(self) -> bytes:
        """Its standard output."""
        return (self.folder / "result.txt").read_bytes()

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Its exit code, negative for a signal; None if it runs on."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                break
            else:
                time.sleep(0.002)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> str:
        """What it was doing."""
        phase = str(self.phase)
        if self.code is None:
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                self.wait()
        return phase

    def require_end(self, seconds: float = GRACE) -> None:
        """Raises `AssertionError` where a process of its session lives on."""
        end = time.monotonic() + seconds
        while left := session(self.pid):
            assert time.monotonic() < end, f"left behind: {left}\n{self.said}"
            time.sleep(0.01)


def session(number: int) -> list[str]:
    """The processes of a session that have not ended (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text(errors="replace")
            state, _, _, of, *_ = text.rpartition(")")[2].split()
            if int(of) == number and state not in "ZX":
                found.append(text.partition(")")[0] + ")")
    return found


def start(
    arguments: list[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], object] = lambda: None,
) -> Command:
    """`cnnft arguments`; `folder` gets what it prints, and `before` is called in the process."""
    folder.mkdir(parents=True, exist_ok=True)
    load_all()
    phase = Phase()
    pid = os.fork()
    if pid:
        return Command(pid, phase, folder)
    gc.freeze()  # what this process inherits may wait, when it dies, for threads that are not here
    try:
        os.setsid()
        for number, name in ((1, "result.txt"), (2, "said.txt")):
            with (folder / name).open("wb") as file:
                os.dup2(file.fileno(), number)
        # pytest's are not those
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment or {})
        if "RANK" in os.environ:
            importlib.reload(distributed)  # which reads the environment
        torch.set_num_threads(1)
        phase.watch()
        before()
        main(arguments)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(70)


def ranks(count: int) -> list[dict[str, str]]:
    """The environment that torchrun gives to each of `count` processes of this machine."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def begin_or_resume(run: Path, *begin: str) -> list[str]:
    """The arguments that resume the run; where it is none yet, those that begin it."""
    if (run / CONFIG).exists():
        return ["finetune", f"--resume={run}"]
    shutil.rmtree(run, ignore_errors=True)  # stopped before it was a run
    return ["finetune", *begin, f"--runs-dir={run.parent}"]


# ---------------------------------------------------------------- what comes out


def run_content(path: Path) -> dict[str, bytes]:
    """All that training determines: weights, momentum, history, metrics, predictions, images; where
    a head was solved its penalties, and all of a network that was trained beside it.
    """
    saved = Run(path).load_checkpoint()
    files = {name: (path / name).read_bytes() for name in DETERMINED}
    files |= {f.name: f.read_bytes() for f in (path / "snapshots").glob("*")}
    if saved is None:
        files["penalties.csv"] = (path / "penalties.csv").read_bytes()
        for part in (path / "comparison.json", *(path / "members").glob("*/*")):
            files |= {str(part): part.read_bytes()} if part.exists() else {}
        for other in (path / "candidates").glob("*"):
            files |= {f"{other.name}/{k}": v for k, v in run_content(other).items()}
        return {name.removeprefix(f"{path}/"): content for name, content in files.items()}
    tensors = {name: tensor.numpy().tobytes() for name, tensor in saved.tensors.items()}
    rows = [line.split(",") for line in (path / "history.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    history = repr([(*row[:seconds], *row[seconds + 1 :]) for row in rows]).encode()
    return files | tensors | {"history": history, "step": str(saved.step).encode()}


def cache_content(folder: Path) -> dict[str, bytes]:
    """What the cache holds: each feature under its key and name, whatever shard it lies in."""
    found = {}
    for path in folder.glob("features/*.safetensors"):
        shard, key = load_file(path), path.name.partition("-")[0]
        for name, value in zip(shard["names"], shard["values"], strict=True):
            found[f"{key} {name.numpy().tobytes().hex()}"] = value.numpy().tobytes()
    for path in folder.glob("pixels/*.safetensors"):
        found[path.name] = load_file(path)["sizes"].numpy().tobytes()
        pixel_file = path.with_suffix(".pixels")
        found[pixel_file.name] = pixel_file.read_bytes()
    return found


def unfinished(folder: Path) -> list[Path]:
    """Hidden and temporary files; the lock of the cache is none."""
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def bytes_lost(expected: Mapping[str, bytes], found: Mapping[str, bytes]) -> int:
    """Bytes that differ between two outcomes."""
    lost = 0
    for name in expected.keys() | found.keys():
        one, other = expected.get(name, b""), found.get(name, b"")
        if one != other:
            lost += abs(len(one) - len(other)) + sum(
                a != b for a, b in zip(one, other, strict=False)
            )
    return lost
