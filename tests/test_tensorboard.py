"""--tensorboard: what TensorBoard reads is the history, also after an interruption."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from cnnft import CnnftError, Config
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]

TAGS = {
    "loss/train": "train_loss", "loss/val": "val_loss",
    "accuracy/train": "train_accuracy", "accuracy/val": "val_accuracy",
    "macro_recall/val": "val_macro_recall",
    "learning_rate/backbone": "lr_backbone", "learning_rate/head": "lr_head",
}  # fmt: skip


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them: tag -> (step, value)."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def history(run: Path) -> dict[str, list[tuple[int, float]]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        tag: [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in rows]
        for tag, key in TAGS.items()
    }


def test_tensorboard_reads_the_history(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--mode=feature-extractor",
        "--head-solver=sgd", "--epochs=3",
        "--workers=0", "--tensorboard", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = Path(outcome.out.strip())
    assert scalars(run) == history(run) and len(history(run)["loss/val"]) == 3


@pytest.mark.parametrize("torn", [False, True])
def test_an_epoch_that_is_done_again_is_told_once(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    """Killed between the second epoch's events and its checkpoint; the last event may be torn."""
    config = Config.of(
        flat, backbone="builtin", mode="feature-extractor",
        head_solver="sgd", epochs=3, batch_size=4, workers=0,
        device="cpu", tensorboard=True, runs_dir=tmp_path / "runs", name="run",
    )  # fmt: skip
    save, calls = Run.save_checkpoint, []

    def dying(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(Run, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        list(run_plan(prepare(config)))
    monkeypatch.undo()
    run = Run.open(tmp_path / "runs" / "run")
    [events] = run.tensorboard.iterdir()
    assert [step for step, _ in scalars(run.path)["loss/val"]] == [1, 2]
    if torn:
        events.write_bytes(events.read_bytes()[:-5])
    resumed = run_plan(prepare(run.config(), run), run)
    assert [event.epoch for event in resumed if isinstance(event, Epoch)] == [2, 3]
    assert len(list(run.tensorboard.iterdir())) == 2
    assert scalars(run.path) == history(run.path) and len(history(run.path)["loss/val"]) == 3


def test_without_the_package_the_extra_is_named_before_any_data_is_read(
    cnnft: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    outcome = cnnft("finetune", tmp_path / "no such data", "--backbone=builtin", "--tensorboard")
    outcome.fails_with(2, "--tensorboard", "pip install 'cnnft[tensorboard]'")


def test_a_folder_that_cannot_be_written_is_named(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = Config.of(flat, backbone="builtin", mode="feature-extractor",
    head_solver="sgd", epochs=1, workers=0,
                    tensorboard=True, runs_dir=tmp_path, name="run")  # fmt: skip
    training = run_plan(prepare(config))
    next(training)
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(CnnftError, match="tensorboard cannot be written"):
        list(training)
