"""Break training in other ways than by kills (tools/kills.py), resume it, and compare the bytes.

    python -m tools.faults [--tries 10] [--seed N]

docs/results/faults.json has the sum over all such commands, docs/reliability.md its table.
Interrupt it at any time; `--tries 0` writes the table alone.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from tools.document import fill
from tools.each_step import children, start_torchrun
from tools.forked import (
    Command,
    begin_or_resume,
    bytes_lost,
    cache_content,
    draw_data,
    run_content,
    start,
    unfinished,
)
from tools.kills import COMMON, finish
from tools.tally import DOCUMENT, Tally, joined, table


@dataclass(frozen=True)
class Place:
    """Images, and a folder in which runs come and go."""

    data: Path
    folder: Path
    chance: random.Random

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return self.runs / "run"

    def begin_anew(self) -> None:
        shutil.rmtree(self.runs, ignore_errors=True)

    def start(self, *options: str, before: Callable[[], object] = lambda: None) -> Command:
        """The command that begins the run, or that resumes it."""
        begin = str(self.data), *COMMON, *(options or ["--workers=0"])
        environment = {"CNNFT_CACHE": str(self.folder / "cache")}
        return start(begin_or_resume(self.run, *begin), self.folder / "said", environment, before)

    def undisturbed(self) -> dict[str, bytes]:
        self.begin_anew()
        finish([self.start()])
        return run_content(self.run)

    def stop_inside(self) -> None:
        """Kill a training when it has two checkpoints."""
        self.begin_anew()
        training = self.start()
        self.wait_for_checkpoints(training)
        training.kill()

    def wait_for_checkpoints(self, training: Command) -> None:
        while len(list((self.run / "state").glob("*.safetensors"))) < 2:
            assert training.wait(0.01) is None, training.said

    def resumed(self, expected: dict[str, bytes]) -> Counter[str]:
        """What becomes of it in the end."""
        training = self.start()
        if training.wait() != 0:
            return Counter({"tries": 1})
        assert not unfinished(self.run)
        lost = bytes_lost(expected, run_content(self.run))
        return Counter({"tries": 1, "survived": 1, "bytes that differ": lost})


Outcome = tuple[Counter[str], str]
"""Counts of tries, and what the command said."""


def last_line(training: Command) -> str:
    return training.said.strip().splitlines()[-1]


# ---------------------------------------------------------------- faults


def limit_writing(size: int) -> None:
    """No file may grow beyond `size` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk(place: Place, expected: dict[str, bytes]) -> Outcome:
    largest = max(map(len, expected.values()))
    place.begin_anew()
    size = place.chance.randrange(1, largest)
    training = place.start(before=lambda: limit_writing(size))
    assert training.wait() == 1, training.said
    said = last_line(training)
    return place.resumed(expected), said


def damage(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    if chance.random() < 0.5:
        del content[at:]
    else:
        content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def damaged_checkpoint(place: Place, expected: dict[str, bytes]) -> Outcome:
    place.stop_inside()
    damage(max((place.run / "state").glob("*.safetensors")), place.chance)
    counts = place.resumed(expected)
    said = (place.folder / "said" / "said.txt").read_text()
    return counts, next(line for line in said.splitlines() if "damaged" in line)


def dead_workers(place: Place, expected: dict[str, bytes]) -> Outcome:
    place.begin_anew()
    training = place.start("--workers=2")
    place.wait_for_checkpoints(training)
    for child in children(training.pid):
        os.kill(child, signal.SIGKILL)
    code = training.wait()  # 0: it was done with its workers
    said = last_line(training) if code == 1 else ""
    return place.resumed(expected), said


def terminated(place: Place, expected: dict[str, bytes]) -> Outcome:
    place.begin_anew()
    training = place.start("--workers=2")
    place.wait_for_checkpoints(training)
    training.kill(signal.SIGTERM)
    code = training.wait(10)
    assert code == 143, (code, training.said)
    training.require_end()
    said = last_line(training)
    return place.resumed(expected), said


def changed_image(place: Place, expected: dict[str, bytes]) -> Outcome:
    place.stop_inside()
    image = place.chance.choice(sorted(place.data.rglob("*.png")))
    kept = image.read_bytes()
    Image.new("RGB", (40, 50)).save(image)
    training = place.start()
    code = training.wait()
    image.write_bytes(kept)
    assert code == 1, training.said
    said = last_line(training)
    return place.resumed(expected), said


def unwritable_place(place: Place, expected: dict[str, bytes]) -> Outcome:
    arguments = [str(place.data), *COMMON, "--workers=0", "--runs-dir=/proc/runs"]
    training = start(["finetune", *arguments], place.folder / "said")
    assert training.wait() == 1, training.said
    return Counter({"tries": 1, "survived": 1}), last_line(training)


FAULTS = {
    "no space left while writing": full_disk,
    "newest checkpoint cut or one bit flipped": damaged_checkpoint,
    "processes that load images die": dead_workers,
    "SIGTERM": terminated,
    "an image changes under the run": changed_image,
    "a place that cannot be written to": unwritable_place,
}


# ---------------------------------------------------------------- several at once


_FROZEN = ("--mode=feature-extractor", "--head-solver=sgd")
KINDS = (_FROZEN, ("--no-probe-first",)) * 2
"""Of four commands at once: two that read features, two that read pixels."""


class Crowd:
    """Commands at once on the same images and the same caches, some of them killed."""

    def __init__(self, place: Place, *options: str) -> None:
        self.place, self.options = place, ("--workers=0", "--cache=disk", *options)
        self.cache = place.folder / "cache"
        self.expected: dict[tuple[str, ...], dict[str, bytes]] = {}
        self.cached: dict[str, bytes] = {}
        for kind in set(KINDS):
            self._clear()
            began = time.monotonic()
            finish([self._start(kind, 0)])
            self.takes = time.monotonic() - began
            self.expected[kind] = self._content(0)
            self.cached |= cache_content(self.cache)

    def _clear(self) -> None:
        for folder in (self.cache, self.place.folder / "crowd"):
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, number: int) -> Path:
        return self.place.folder / "crowd" / str(number) / "run"

    def _content(self, number: int) -> dict[str, bytes]:
        return run_content(self._run(number))

    def _start(self, kind: tuple[str, ...], number: int, limit: str = "") -> Command:
        runs = self._run(number).parent
        arguments = [str(self.place.data), *COMMON, *self.options, *kind, f"--runs-dir={runs}"]
        environment = {"CNNFT_CACHE": str(self.cache), "CNNFT_CACHE_LIMIT": limit}
        return start(["finetune", *arguments], runs / "said", environment)

    def _cache_clear(self) -> Command:
        folder = self.place.folder / "clear"
        return start(["cache", "--clear"], folder, {"CNNFT_CACHE": str(self.cache)})

    def attempt(self, kills: int, kinds: tuple[tuple[str, ...], ...] = KINDS) -> Counter[str]:
        """Of all `kinds` at once kill some at random instants; the others must not notice."""
        self._clear()
        chance = self.place.chance
        commands = [self._start(kind, number) for number, kind in enumerate(kinds)]
        victims = chance.sample(range(len(kinds)), kills)
        for victim in victims:
            if commands[victim].wait(chance.uniform(0, self.takes)) is None:
                commands[victim].kill()
        return self._judge(kinds, commands, victims)

    def attempt_with_clear(self, limit: str) -> Counter[str]:
        """All at once while `cnnft cache clear` and evictions take away what they read."""
        self._clear()
        commands = [self._start(kind, number, limit) for number, kind in enumerate(KINDS)]
        while any(command.wait(0) is None for command in commands):
            clearing = self._cache_clear()
            code = clearing.wait()
            held = code == 1 and "is being written to by another process" in clearing.said
            assert code == 0 or held, clearing.said
        return self._judge(KINDS, commands, [])

    def _judge(
        self, kinds: tuple[tuple[str, ...], ...], commands: list[Command], victims: list[int]
    ) -> Counter[str]:
        survivors = [n for n in range(len(kinds)) if n not in victims]
        finish([commands[n] for n in survivors])
        lost = sum(bytes_lost(self.expected[kinds[n]], self._content(n)) for n in survivors)
        lost += self._invalid()
        # What they left serves the next one.
        shutil.rmtree(self._run(0).parent)
        finish([self._start(kinds[0], 0)])
        lost += bytes_lost(self.expected[kinds[0]], self._content(0)) + self._invalid()
        temporary = [p for p in unfinished(self.cache) if p.is_file()]
        assert not temporary, temporary
        for command in commands:
            command.require_end()
        return Counter({"tries": 1, "survived": 1, "bytes that differ": lost})

    def _invalid(self) -> int:
        """Bytes of the cache that are other than those of commands alone."""
        found = cache_content(self.cache)
        return bytes_lost({name: self.cached[name] for name in found}, found)


def crowds(place: Place) -> Iterator[tuple[str, Callable[[], Counter[str]]]]:
    crowd = Crowd(place)
    yield "four commands on one cache, two of them killed", lambda: crowd.attempt(2)
    yield (
        "four commands on one cache while it is cleared and entries are evicted",
        lambda: crowd.attempt_with_clear(place.chance.choice(("50", "0.0002"))),
    )


# ---------------------------------------------------------------- torchrun


def killed_under_torchrun(place: Place, kills: int) -> Counter[str]:
    """Kill one of two processes as often; torchrun starts both again, and they resume."""
    data, folder = place.data, place.folder / "torchrun"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["-m", "cnnft", "finetune", data, *COMMON, "--workers=0", "--epochs=20", "--runs-dir"]
    _, said = (alone := start_torchrun(2, *command, folder / "whole")).communicate()
    assert alone.returncode == 0, said
    runs = folder / "killed"
    training = start_torchrun(2, f"--max-restarts={kills}", *command, runs)
    for _ in range(kills):
        before = reached(runs)
        while reached(runs) == before:  # it goes on from where it was
            assert training.poll() is None, training.communicate()
            time.sleep(0.01)
        os.kill(place.chance.choice(children(training.pid)), signal.SIGKILL)
    _, said = training.communicate()
    assert training.returncode == 0, said
    lost = bytes_lost(run_content(folder / "whole" / "run"), run_content(runs / "run"))
    return Counter({"tries": kills, "survived": kills, "bytes that differ": lost})


def reached(runs: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in (runs / "run" / "state").glob("*.safetensors")]
    return max((int(name.split("-")[0]) for name in names), default=0)


# ---------------------------------------------------------------- the tool


def attempts(place: Place) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """(what is tried, a function that tries it once)."""
    expected = place.undisturbed()
    for name, fault in FAULTS.items():
        yield name, lambda fault=fault: fault(place, expected)
    for name, attempt in crowds(place):
        yield name, lambda attempt=attempt: (attempt(), "")
    yield (
        "one of two processes under torchrun dies",
        lambda: (killed_under_torchrun(place, 3), ""),
    )


def summary(tally: Tally) -> str:
    header = ["fault", "tries", "survived", "bytes that differ", "what is said"]
    rows = []
    for name, counts in tally.sums().items():
        numbers = [f"{counts[column]:,}" for column in header[1:4]]
        rows.append([name, *numbers, tally.words(name).replace("|", "\\|")])
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10, help="of each fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally = Tally("faults", options.seed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(
                draw_data(Path(folder) / "data"), Path(folder), random.Random(options.seed)
            )
            for name, attempt in attempts(place) if options.tries else ():
                done: Counter[str] = Counter()
                while done["tries"] < options.tries:
                    counts, said = attempt()
                    done = joined(done, counts)
                    tally.add({name: counts}, {name: said.replace(folder, "…")} if said else {})
                print(name, dict(done), said, flush=True)
    finally:
        fill(DOCUMENT, "faults", summary(tally))


if __name__ == "__main__":
    main()
