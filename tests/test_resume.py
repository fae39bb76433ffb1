"""An interrupted run goes on and ends with the same weights, to the bit."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw
from safetensors.torch import load_file

from cnnft import CnnftError, Config
from cnnft.data import loading
from cnnft.runs.checkpoints import Checkpoint, save_checkpoint
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.training import schedules
from cnnft.training.events import Stopped
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone

Cli = Callable[..., Outcome]
EPOCHS, STEPS = 3, 4  # 16 training images in batches of 4


def settings(flat: Path, tmp_path: Path, name: str, **more: object) -> Config:
    return Config.of(
        flat, backbone="builtin", epochs=EPOCHS, batch_size=4, workers=0, device="cpu", name=name,
        runs_dir=tmp_path / "runs", probe_first=False, batchnorm="train", **more,
    )  # fmt: skip


def finish(config: Config, run: Run | None = None) -> Run:
    for event in run_plan(prepare(config, run), run):
        last = event
    return last.run


def state(run: Run) -> dict[str, torch.Tensor]:
    """Weights of the best epoch, and of the last one with the optimizer's momentum."""
    saved = run.load_checkpoint()
    return load_file(run.path / "model.safetensors") | saved.tensors


def history(run: Run) -> list[tuple]:
    rows = [line.split(",") for line in (run.path / "history.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return [(*row[:seconds], *row[seconds + 1 :]) for row in rows]


def lines(run: Run) -> list[dict]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [row | {"seconds": None} for row in rows]


def same(run: Run, other: Run) -> None:
    one, two = state(run), state(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert history(run) == history(other)
    assert lines(run) == lines(other)
    assert run.metrics() == other.metrics()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Run]]:
    """(data, a run that was never interrupted)."""
    folder = tmp_path_factory.mktemp("whole")
    flat = folder / "flat"
    for label, name in enumerate(("ants", "bees")):
        for n in range(10):
            draw(flat / name / f"{n}.png", label, n)
    yield flat, finish(settings(flat, folder, "whole"))


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS, 3 * STEPS - 1])
def test_stopped_after_any_step_and_resumed(whole, tmp_path: Path, step: int, workers: int):
    flat, expected = whole
    config = settings(flat, tmp_path, "stopped")
    taken = 0

    def stop() -> bool:
        return taken >= step

    for event in run_plan(prepare(config), stop=stop):
        taken += isinstance(event, StepDone)
    assert isinstance(event, Stopped) and event.step == step
    run = Run.open(event.run.path)
    torch.rand(7)  # whatever happened in between
    resumed = Config.from_dict(run.config().to_dict() | {"workers": workers}, "")
    assert finish(resumed, run).path == run.path
    same(run, expected)


@pytest.mark.parametrize(
    "more",
    [pytest.param({"optimizer": "adamw", "weight_decay": 0.05, "schedule": "one-cycle"},
                  marks=pytest.mark.slow),
     pytest.param({"optimizer": "adan", "schedule": "plateau", "warmup_epochs": 0.5},
                  marks=pytest.mark.slow),
     pytest.param({"optimizer": "nadam", "layer_decay": 0.5, "schedule": "cosine-restarts"},
                  marks=pytest.mark.slow),
     {"ema": 0.9, "mixup": 0.2}, pytest.param({"swa": 2}, marks=pytest.mark.slow),
     {"schedule": "cosine-restarts", "snapshots": 3},
     pytest.param({"recalibrate_bn": False, "patience": 2}, marks=pytest.mark.slow)],
    ids=lambda more: "-".join(map(str, more.values())),
)  # fmt: skip
def test_other_ways_to_train_resume_too(whole, tmp_path: Path, more: dict, monkeypatch):
    """plateau falls in the last epoch, whose first step is the last one before the stop."""
    monkeypatch.setattr(schedules, "_PLATEAU_THRESHOLD", 1.0)  # no loss is low enough
    expected = finish(settings(whole[0], tmp_path, "expected", plateau_patience=0, **more))
    plan = prepare(settings(whole[0], tmp_path, "stopped", plateau_patience=0, **more))
    taken: list[StepDone] = []
    for event in run_plan(plan, stop=lambda: len(taken) > 2 * STEPS):
        if isinstance(event, StepDone):
            taken.append(event)
    run = Run.open(event.run.path)
    assert isinstance(event, Stopped) and event.step == 2 * STEPS + 1
    finish(run.config(), run)
    same(run, expected)
    if more.get("schedule") == "plateau":
        rates = [float(row[2]) for row in history(run)[1:]]
        assert rates == pytest.approx([0.001, 0.001, 0.0001])  # the warm-up's epoch does not count


def test_augmented_and_mixed_batches_are_the_same_after_a_stop(whole, tmp_path: Path) -> None:
    flat, other = whole
    more = {"augment": "strong", "mixup": 0.2, "cutmix": 1.0, "sampling": "balanced"}
    expected = finish(settings(flat, tmp_path, "expected", **more))
    first = settings(flat, tmp_path, "stopped", **more)
    taken: list[StepDone] = []
    for stopped in run_plan(prepare(first), stop=lambda: len(taken) > STEPS):
        if isinstance(stopped, StepDone):
            taken.append(stopped)
    assert isinstance(stopped, Stopped) and stopped.step == STEPS + 1
    run = Run.open(stopped.run.path)
    finish(Config.from_dict(run.config().to_dict() | {"workers": 2}, ""), run)
    same(run, expected)
    assert history(run) != history(other)


@pytest.mark.parametrize("place", ["step", "epoch", "save_classifier", "save_checkpoint"])
def test_killed_anywhere_and_resumed(whole, tmp_path: Path, place: str, monkeypatch):
    """Killed in an epoch, after one, or while the files of one are written."""
    flat, expected = whole
    config = settings(flat, tmp_path, "killed", checkpoint_every="1")
    if place.startswith("save"):
        save, calls = getattr(Run, place), []

        def dying(self: Run, *arguments: object) -> None:
            calls.append(place)
            if len(calls) == 2:
                raise Killed
            save(self, *arguments)

        monkeypatch.setattr(Run, place, dying)
    with pytest.raises(Killed):
        for event in run_plan(prepare(config)):
            if place == "step" and isinstance(event, StepDone) and event.step == STEPS + 2:
                raise Killed
            if place == "epoch" and isinstance(event, Epoch) and event.epoch == 2:
                raise Killed
    monkeypatch.undo()
    run = Run.open(tmp_path / "runs" / "killed")
    finish(run.config(), run)
    same(run, expected)


def test_killed_before_the_first_checkpoint(whole, tmp_path: Path):
    flat, expected = whole
    with Run.create(settings(flat, tmp_path, "early"), "early") as run:
        pass
    finish(run.config(), run)
    same(run, expected)


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path: Path, damage: str, caplog):
    flat, expected = whole
    events = run_plan(prepare(settings(flat, tmp_path, "damaged")))
    epochs = 0
    while epochs < 2:
        epochs += isinstance(next(events), Epoch)
    events.close()
    run = Run.open(tmp_path / "runs" / "damaged")
    older, newest = sorted((run.path / "state").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        del content[-100:]
    else:
        content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with caplog.at_level("WARNING", "cnnft"):
        assert run.load_checkpoint().step == STEPS
    assert str(newest) in caplog.text and str(older) not in caplog.text
    finish(run.config(), run)
    same(run, expected)


def test_a_dataset_that_changed_is_refused(whole, tmp_path: Path, cnnft: Cli, flat: Path):
    run = finish(settings(flat, tmp_path, "changed"))
    draw(flat / "ants" / "0.png", 1, 99)
    cnnft("finetune", "--resume", run.path).fails_with(1, "cannot go on", "start a new run")


def test_flags_that_contradict_the_run_are_listed(cnnft: Cli, whole):
    _, run = whole
    cnnft("finetune", "--resume", run.path, "--seed", 5, "--lr", 0.1, "--workers", 1).fails_with(
        2, "differ in lr, seed"
    )
    cnnft("finetune", "--resume", run.path, "--epochs", 1).fails_with(2, "--epochs 1 is less")
    cnnft("finetune", "--resume", run.path, "--force").fails_with(
        2, "leave out --config and --force"
    )
    cnnft("finetune", "--resume", run.path.parent / "none").fails_with(2, "no such run")


def test_a_finished_run_is_finished_again_and_can_be_lengthened(cnnft: Cli, tmp_path, flat):
    run = finish(settings(flat, tmp_path, "longer"))
    before = state(run)
    outcome = cnnft("finetune", "--resume", run.path, "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["run"] == str(run.path)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(run).items())
    outcome = cnnft("finetune", "--resume", run.path, "--epochs", EPOCHS + 2)
    assert outcome.code == 0, outcome.err
    assert len(history(run)) == 1 + EPOCHS + 2 and run.config().training.epochs == EPOCHS + 2


def test_without_a_readable_checkpoint_training_begins_anew_with_a_probed_head(
    cnnft: Cli, whole, tmp_path: Path
):
    """It trained a random head at the rate of a fitted one, and said that it was probed."""
    config = settings(whole[0], tmp_path, "damaged").replace(probe_first=None)
    run = finish(config)
    expected = history(run)
    for path in (run.path / "state").glob("*.safetensors"):
        path.write_bytes(b"damaged")
    model = (run.path / "model.safetensors").read_bytes()
    # It would be replaced by that of the first epoch, and be lost in a kill after that.
    cnnft("finetune", "--resume", run.path).fails_with(1, "all its checkpoints are damaged")
    assert (run.path / "model.safetensors").read_bytes() == model
    (run.path / "model.safetensors").unlink()
    outcome = cnnft("finetune", "--resume", run.path)
    assert outcome.code == 0 and "is damaged" in outcome.err
    assert "no checkpoint is whole: training begins anew" in outcome.err
    assert history(run) == expected


def test_the_plan_knows_where_its_head_comes_from(whole, tmp_path: Path):
    config = settings(whole[0], tmp_path, "head").replace(probe_first=None)
    assert prepare(config).head_from == "probe"
    assert prepare(config.replace(probe_first=False)).head_from == "new"
    run = finish(config)
    resumed = prepare(run.config(), run)
    assert resumed.head_from == "checkpoint" and resumed.head_is_fitted
    assert resumed.rates == prepare(config).rates


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_names_the_command(
    cnnft: Cli, whole, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    flat, expected = whole
    before = signal.getsignal(number)
    take, steps = torch.optim.SGD.step, []

    def step(self, *arguments, **options):
        steps.append(1)
        if len(steps) == STEPS + 1:
            os.kill(os.getpid(), number)
        return take(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--epochs", EPOCHS, "--batch-size=4",
        "--workers=0", "--no-probe-first", "--batchnorm=train", "--runs-dir", tmp_path / "runs",
        "--device=cpu",
    )  # fmt: skip
    run = Run.open(tmp_path / "runs" / "flat-builtin")
    outcome.fails_with(128 + number, f"after step {STEPS + 1}", f"--resume {run.path}")
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    assert cnnft("finetune", "--resume", run.path).code == 0
    same(run, expected)


@pytest.mark.parametrize(
    ("place", "number", "step"),
    # After an epoch pairs of its batches are read again, for BatchNorm statistics.
    [("step", STEPS + STEPS // 2 + 2, STEPS + 1), ("validation", 2, 2 * STEPS)],
)
def test_a_signal_while_images_are_waited_for_saves_at_once(
    cnnft: Cli, whole, tmp_path: Path, place: str, number: int, step: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of a step, or of the validation of an epoch, which is then still to come."""
    flat, expected = whole
    read, released, fetched = loading.in_threads, threading.Event(), []

    def hanging(function, keys, *arguments, **options):
        def fetch(key):
            fetched.append("validation" if isinstance(key, range) else "step")
            if fetched[-1] == place and fetched.count(place) == number:
                os.kill(os.getpid(), signal.SIGTERM)
                released.wait(30)
            return function(key)

        return read(fetch, keys, *arguments, **options)

    monkeypatch.setattr(loading, "in_threads", hanging)
    start = time.monotonic()
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--epochs", EPOCHS, "--batch-size=4",
        "--workers=0", "--no-probe-first", "--batchnorm=train", "--runs-dir", tmp_path / "runs",
        "--device=cpu", "--checkpoint-every=1h",
    )  # fmt: skip
    released.set()
    run = Run.open(tmp_path / "runs" / "flat-builtin")
    outcome.fails_with(143, f"interrupted after step {step};", f"--resume {run.path}")
    assert time.monotonic() - start < 20
    monkeypatch.undo()
    assert cnnft("finetune", "--resume", run.path).code == 0
    same(run, expected)


def test_only_two_checkpoints_are_kept(whole):
    _, run = whole
    assert len(list((run.path / "state").glob("*.safetensors"))) == 2


def test_config_without_data_is_no_run_to_resume(tmp_path: Path):
    with pytest.raises(CnnftError):
        Run.open(tmp_path)


def test_a_run_that_lost_its_weights_is_not_resumed(cnnft: Cli, tmp_path: Path, flat: Path):
    run = finish(settings(flat, tmp_path, "lost"))
    (run.path / "model.safetensors").unlink()
    cnnft("finetune", "--resume", run.path).fails_with(1, "has lost its model.safetensors")


def test_a_damaged_checkpoint_does_not_push_out_the_good_one(tmp_path: Path):
    for step in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(step, {"x": torch.ones(1)}, {}))
    newest = max(tmp_path.iterdir())
    newest.write_bytes(b"damaged")
    newest.rename(tmp_path / newest.name.replace("0002-", "0009-"))
    save_checkpoint(tmp_path, Checkpoint(2, {"x": torch.ones(1)}, {}))
    assert sorted(int(path.name.split("-")[0]) for path in tmp_path.iterdir()) == [1, 2]
