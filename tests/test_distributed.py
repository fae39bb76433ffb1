"""Several processes train as one does: torchrun on this machine, gloo, the real entry points."""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw_folder
from safetensors.torch import load_file

from cnnft import load
from cnnft.analysis.evaluate import Seen, evaluate
from cnnft.data.reading import read_dataset
from cnnft.data.sampler import BalancedDraw, KeyedBatches
from cnnft.inference.predict import Inference
from cnnft.machine import distributed
from cnnft.runs.run import Run
from tools.each_step import children, follow, start_torchrun

COMMON = {
    "backbone": "builtin", "epochs": 2, "workers": 0, "device": "cpu", "batchnorm": "frozen",
    "name": "run", "image_size": 64,
}  # fmt: skip
CASES = {
    "odd batches, the last of two": {"batch_size": 7, "probe_first": False},
    "accumulation": {"batch_size": 8, "micro_batch": 2, "probe_first": False},
    "shares of none": {"batch_size": 3, "mode": "feature-extractor", "head_solver": "sgd"},
    "probe": {"batch_size": 8, "normalize": "dataset"},
    "balanced": {
        "batch_size": 7,
        "mode": "feature-extractor",
        "head_solver": "sgd",
        "sampling": "balanced",
    },
}
TRAINED_STATISTICS = {"batch_size": 8, "batchnorm": "train", "probe_first": False}
TOLERANCE = 1e-5
"""Of weights of about 1 after some steps: the same sums in another order."""


def torchrun(processes: int, *arguments: object) -> Outcome:
    started = start_torchrun(processes, *arguments)
    out, err = started.communicate(timeout=500)
    return Outcome(started.returncode, out, err)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """16 images to train on and 6 to validate on."""
    draw_folder(tmp_path / "data" / "train", ("ants", "bees"), 8)
    draw_folder(tmp_path / "data" / "val", ("ants", "bees"), 3, first_seed=50)
    return tmp_path / "data"


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_step_is_that_of_one_process(data: Path, tmp_path: Path, processes: int) -> None:
    cases = {name: COMMON | more | {"data": str(data)} for name, more in CASES.items()}
    statistics = COMMON | TRAINED_STATISTICS | {"data": str(data)}
    (tmp_path / "cases.json").write_text(json.dumps(cases | {"statistics": statistics}))
    outcome = torchrun(
        processes, "-m", "tools.each_step", tmp_path / "cases.json", tmp_path / "many"
    )
    assert outcome.code == 0, outcome.err
    for name, settings in cases.items():
        one, many = tmp_path / "one" / name, tmp_path / "many" / name
        one.mkdir(parents=True)
        follow(settings, one)
        steps = [load_file(one / f"{n}.safetensors") for n in range(1, len(list(one.iterdir())))]
        assert len(list(many.iterdir())) == len(steps) + 1 >= 5
        for step, alone in enumerate(steps, start=1):
            together = load_file(many / f"{step}.safetensors")
            worst = max(float((together[n] - alone[n]).abs().max()) for n in alone)
            assert worst < TOLERANCE, (name, step, worst)
        assert not torch.equal(steps[0]["fc.weight"], steps[-1]["fc.weight"])  # something moved
        alone_run, run = Run(one / "run"), Run(many / "run")
        assert run.metrics().val.n == 6
        assert run.metrics().val.correct == alone_run.metrics().val.correct
        assert (run.path / "data.csv").read_bytes() == (alone_run.path / "data.csv").read_bytes()
    # Where BatchNorm learns statistics, all processes evaluated what the main one saved.
    run = Run(tmp_path / "many" / "statistics" / "run")
    found = evaluate(load(run.path), read_dataset(data, ("val",)), Inference(workers=0), Seen())
    assert found.overall.loss == pytest.approx(run.metrics().val.loss, abs=1e-5)


COMMANDS = """
import json, sys
from cnnft.cli import main
*before, last = json.loads(sys.argv[1])
for arguments in before:
    try:
        main(arguments)
    except SystemExit as end:
        print(f"exit code {end.code or 0}", file=sys.stderr)
main(last)
"""
"""One start of the processes takes longer than all of them."""


SMALL = (
    "--backbone=builtin", "--epochs=1", "--device=cpu", "--image-size=64", "--force",
    "--mode=feature-extractor", "--head-solver=sgd",
)  # fmt: skip


@pytest.mark.slow
def test_commands_under_torchrun_write_once(data: Path, tmp_path: Path, cnnft) -> None:
    runs, others = tmp_path / "runs", tmp_path / "others"
    again = ["finetune", data, *SMALL, "--workers=0", "--name=run", "--runs-dir", others]
    assert cnnft(*again).code == 0
    predict = ["predict", data, "-m", runs / "data-builtin", "--workers=0", "--device=cpu"]
    csvs = [tmp_path / "together.csv", tmp_path / "alone.csv"]
    commands = [
        ["finetune", data, *SMALL, "--workers=1", "--mixup=0.2", "--batch-size=1",
         "--tensorboard", "--runs-dir", runs],
        [*predict, "--output", csvs[0]],
        [*again, "--seed=1"],
        [*again, "--runs-dir", tmp_path, f"--name={data.name}"],
    ]  # fmt: skip
    (tmp_path / "commands.py").write_text(COMMANDS)
    told = json.dumps([[str(argument) for argument in command] for command in commands])
    outcome = torchrun(2, tmp_path / "commands.py", told)
    assert outcome.err.count("exit code") == outcome.err.count("exit code 0") == 6, outcome.err
    assert outcome.code == 1 and outcome.err.count("which is not a run") == 1, outcome.err
    assert "error: rank 1" not in outcome.err and "this is a bug" not in outcome.err
    assert outcome.out == f"{runs}/data-builtin\n{others}/run\n"
    assert outcome.err.count("best epoch") == 2
    assert [path.name for path in runs.iterdir()] == ["data-builtin"]
    assert len(list((runs / "data-builtin" / "tensorboard").iterdir())) == 1
    assert [path.name for path in others.iterdir()] == ["run"]
    assert Run(others / "run").config().training.seed == 1
    assert cnnft(*predict, "--output", csvs[1]).code == 0
    together, alone = (list(csv.DictReader(file.open())) for file in csvs)
    assert len(alone) == 22 and [row["file"] for row in together] == [r["file"] for r in alone]
    assert [row["label"] for row in together] == [row["label"] for row in alone]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--epochs=0", "out of range"),
        pytest.param("--epochs=many", "'--epochs'", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_that_all_processes_meet_is_told_once(
    data: Path, tmp_path: Path, more: str, words: str
) -> None:
    outcome = torchrun(2, "-m", "cnnft", "finetune", data, *SMALL, "--runs-dir", tmp_path, more)
    assert outcome.code != 0 and outcome.err.count(words) == 1, outcome.err
    assert "error: rank 1" not in outcome.err
    assert "this is a bug" not in outcome.err


def test_a_collective_where_the_main_process_is_alone_is_refused() -> None:
    broadcast = distributed.broadcast_from_main
    with pytest.raises(RuntimeError, match="collective within broadcast_from_main"):
        broadcast(lambda: broadcast(lambda: 1))
    assert broadcast(lambda: 1) == 1


@pytest.mark.slow
def test_told_to_stop_all_save_and_one_goes_on(data: Path, tmp_path: Path, cnnft) -> None:
    started = start_torchrun(
        2, "-m", "cnnft", "finetune", data, "--backbone=builtin", "--epochs=200",
        "--batch-size=4", "--workers=1", "--device=cpu", "--checkpoint-every=1", "--name=run",
        "--image-size=64", "--runs-dir", tmp_path,
    )  # fmt: skip
    state = tmp_path / "run" / "state"
    wait_until(lambda: len(list(state.glob("*.safetensors"))) == 2)
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=100)
    assert err.count("go on with: cnnft finetune --resume") == 1, err
    saved = Run(tmp_path / "run").load_checkpoint()
    assert saved is not None and f"interrupted after step {saved.step};" in err
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("epochs = 200", f"epochs = {saved.step // 4 + 1}"))
    assert cnnft("finetune", "--resume", tmp_path / "run").code == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
def test_a_killed_process_is_restarted_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    command = [
        "-m", "cnnft", "finetune", data, "--backbone=builtin", "--epochs=6", "--batch-size=4",
        "--workers=0", "--device=cpu", "--checkpoint-every=1", "--image-size=64", "--name=run",
        "--runs-dir",
    ]  # fmt: skip
    whole = torchrun(2, *command, tmp_path / "whole")
    assert whole.code == 0, whole.err
    killed = start_torchrun(2, "--max-restarts=1", *command, tmp_path / "killed")
    state = tmp_path / "killed" / "run" / "state"
    wait_until(lambda: len(list(state.glob("*.safetensors"))) == 2)
    os.kill(children(killed.pid)[1], signal.SIGKILL)
    _, err = killed.communicate(timeout=300)
    assert killed.returncode == 0, err
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["run"]
    runs = [Run(tmp_path / name / "run") for name in ("whole", "killed")]
    one, two = (run.load_checkpoint() for run in runs)
    assert one and two and one.step == two.step == 24
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert runs[0].metrics() == runs[1].metrics()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
def test_a_process_that_stands_still_is_named_and_the_run_can_go_on(
    data: Path, tmp_path: Path, cnnft
) -> None:
    started = start_torchrun(
        2, "-m", "cnnft", "finetune", data, "--backbone=builtin", "--epochs=2000",
        "--batch-size=4", "--workers=1", "--device=cpu", "--checkpoint-every=1", "--name=run",
        "--image-size=64", "--runs-dir", tmp_path,
    )  # fmt: skip
    state = tmp_path / "run" / "state"
    wait_until(lambda: len(list(state.glob("*.safetensors"))) == 2)
    os.kill(children(started.pid)[1], signal.SIGSTOP)
    since = time.monotonic()
    _, err = started.communicate(timeout=200)
    assert 45 < time.monotonic() - since < 120
    assert started.returncode == 1
    assert err.count("error: ") == err.count("error: rank 1 on ") == 1, err
    saved = Run(tmp_path / "run").load_checkpoint()
    assert saved is not None
    config = tmp_path / "run" / "config.toml"
    config.write_text(
        config.read_text().replace("epochs = 2000", f"epochs = {saved.step // 4 + 1}")
    )
    assert cnnft("finetune", "--resume", tmp_path / "run").code == 0


def wait_until(holds: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_shares_cover_everything_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (1, 2, 3, 7):
        for count in (0, 1, 2, 6, 20):
            monkeypatch.setattr(distributed, "world_size", world)
            parts = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "rank", rank)
                parts += distributed.shard(count)
            assert parts == list(range(count))


@pytest.mark.parametrize("draw", [None, BalancedDraw([0] * 8 + [1] * 2)])
def test_the_shares_of_a_batch_are_the_batch(
    monkeypatch: pytest.MonkeyPatch, draw: BalancedDraw | None
) -> None:
    whole = list(KeyedBatches(10, 3, 0, 2, draw=draw))
    monkeypatch.setattr(distributed, "world_size", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", rank)
        shares.append(list(KeyedBatches(10, 3, 0, 2, draw=draw)))
    for step, batch in enumerate(whole):
        counted = [key for share in shares for key in share[step] if key[1] >= 0]
        assert counted == batch and all(share[step] for share in shares)
