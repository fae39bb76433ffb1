"""A few of the kills and faults of tools/kills.py and tools/faults.py, which try many."""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and reads /proc", allow_module_level=True)

from cnnft.cache.features import Features
from tools.faults import FAULTS, KINDS, Crowd, Place
from tools.forked import bytes_lost, draw_data, make_backbone
from tools.kills import MATRIX, Subjects, Trial, finish, kill_and_repeat, whole
from tools.tally import Tally


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("subjects"))


QUICK = ("finetune, probe first", "predict --output")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MATRIX],
)
def test_killed_at_random_instants_and_resumed(
    subjects: Subjects, tmp_path: Path, name: str
) -> None:
    counts: Counter[str] = Counter()
    kill_and_repeat(MATRIX[name], subjects, tmp_path / "t", 3, random.Random(0), counts.update)
    assert counts["killed"] >= 3 and counts["bytes that differ"] == 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(draw_data(tmp_path / "data"), tmp_path, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_other_faults_lose_nothing(place: Place, fault) -> None:
    counts, _ = fault(place, place.undisturbed())
    assert counts["survived"] == 1 and counts["bytes that differ"] == 0


def test_one_of_two_commands_on_one_cache_is_killed(place: Place, tmp_path: Path) -> None:
    tiny = (f"--backbone=local-dir:{make_backbone(tmp_path / 'tiny')}", "--image-size=32")
    counts = Crowd(place, *tiny).attempt(1, (KINDS[0], KINDS[0]))
    assert counts["survived"] == 1 and counts["bytes that differ"] == 0


@pytest.mark.slow
def test_four_commands_on_one_cache_two_of_them_killed(place: Place) -> None:
    crowd = Crowd(place)
    for counts in (crowd.attempt(2), crowd.attempt_with_clear("0.0002")):
        assert counts["survived"] == 1 and counts["bytes that differ"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_killed_when_one_of_two_processes_has_cached_some_features(
    subjects: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """The rest is computed in the same batches, though by other processes."""
    trial = Trial(MATRIX["two processes"], subjects, tmp_path / "t")
    expected, _ = whole(trial)
    trial.begin_anew()
    save = Features._save

    def save_and_die(self: Features, rows: list[int], left: int) -> None:
        save(self, rows, left)
        if os.environ["RANK"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Features, "_save", save_and_die)
        commands = trial.start()
    assert commands[int(victim)].wait() == -signal.SIGKILL
    for command in commands:
        command.kill()
    finish(trial.start())
    assert bytes_lost(expected, trial.content()) == 0


def test_a_difference_is_counted() -> None:
    assert bytes_lost({"a": b"12", "b": b"1"}, {"a": b"13"}) == 2


def test_counts_are_summed_over_commands(tmp_path: Path) -> None:
    for seed in (1, 2):
        for _ in range(2):
            tally = Tally("kills", seed, tmp_path / "kills.json")
            tally.add({"row": {"killed": 2, "slowest": seed}}, {"row": f"seed {seed}"})
    assert tally.sums() == {"row": Counter({"killed": 8, "slowest": 2})}
    assert [record["seed"] for record in tally.records()] == [1, 2]
    assert tally.words("row") == "seed 2" and tally.words("other") == ""
