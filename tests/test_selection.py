"""Which epoch a run keeps: the lowest log-loss after temperature, of the start and all epochs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cnnft import Config, load
from cnnft.data.dataset import Samples
from cnnft.inference.predictions import Predictions
from cnnft.runs.run import Run
from cnnft.training.events import Event, StartScored
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.selection import validated
from cnnft.training.step import StepDone


def predicted(logits: Tensor, labels: Sequence[int]) -> Predictions:
    names = tuple(f"{i}.png" for i in range(len(labels)))
    return Predictions(
        Samples(paths=names, labels=tuple(labels), classes=("a", "b"), hashes=names), logits, "val"
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_the_loss_is_that_of_the_likeliest_temperature(balanced: bool) -> None:
    labels = [0] * 30 + [1] * 6
    noise = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(36, 2, generator=noise)
    logits[torch.arange(36), labels] += 3
    weight = np.array([36 / (2 * 30), 36 / (2 * 6)])[labels] if balanced else np.ones(36)
    losses, priors = [], []
    for temperature in np.geomspace(0.05, 20, 4000):
        scaled = logits.double().numpy() / temperature
        log_probs = scaled - np.logaddexp(*scaled.T)[:, None]
        losses.append(-np.average(log_probs[np.arange(36), labels], weights=weight))
        priors.append(4 * (1 / temperature - 1 + np.log(temperature)) / 36)
    found = validated(predicted(logits, labels), balanced)
    likeliest = np.argmin(np.add(losses, priors))
    assert found.calibrated_loss == pytest.approx(losses[likeliest], abs=1e-3)
    assert found.val == predicted(logits, labels).score()


def settings(data: Path, folder: Path, **more: object) -> Config:
    values = {"backbone": "builtin", "epochs": 3, "batch_size": 8, "workers": 0, "device": "cpu"}
    values |= {"image_size": 32, "runs_dir": folder, "name": "run"} | more
    return Config.of(data, **values)


def test_the_best_epoch_has_the_lowest_loss_after_temperature(flat: Path, tmp_path: Path) -> None:
    plan = prepare(settings(flat, tmp_path, epochs=6, probe_first=False, lr=0.01, head_lr=0.3))
    events = list(run_plan(plan))
    assert not any(isinstance(event, StartScored) for event in events)
    run = Run.open(tmp_path / "run")
    losses = [epoch.val_calibrated_loss for epoch in run.history()]
    assert run.metrics().best_epoch == 1 + losses.index(min(losses))
    best = [epoch.best for epoch in run.history()]
    assert best == [loss < min(losses[:i], default=np.inf) for i, loss in enumerate(losses)]
    kept = run.predictions()
    assert kept is not None
    assert kept.score().loss == pytest.approx(min(losses), rel=1e-3)


RUINOUS = {"lr": 1.0, "head_lr": 1e-9}


def test_a_run_never_ends_below_its_start(flat: Path, tmp_path: Path) -> None:
    plan = prepare(settings(flat, tmp_path, **RUINOUS))
    before = {k: v.clone() for k, v in plan.classifier.network.state_dict().items()}
    events = list(run_plan(plan))
    (start,) = [event for event in events if isinstance(event, StartScored)]
    run = Run.open(tmp_path / "run")
    assert not any(epoch.best for epoch in run.history()) and len(run.history()) == 3
    metrics = run.metrics()
    assert metrics.best_epoch == 0 and metrics.val.correct == start.val.correct
    assert metrics.train.loss is metrics.train.accuracy is None
    state = load_file(run.path / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    predictions = run.predictions()
    assert predictions is not None
    answers = load(run.path, device="cpu").predict(predictions.samples.paths)
    found = [answer.label for answer in answers]
    names = predictions.samples.classes
    assert found == [names[i] for i in predictions.logits.argmax(dim=1)]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_run_that_was_stopped_keeps_its_start(flat: Path, tmp_path: Path, steps: int) -> None:
    whole = list(run_plan(prepare(settings(flat, tmp_path, name="whole", **RUINOUS))))[-1]
    config = settings(flat, tmp_path, **RUINOUS)
    seen: list[Event] = []

    def stop() -> bool:
        return sum(isinstance(event, StepDone) for event in seen) >= steps

    for event in run_plan(prepare(config), stop=stop):
        seen.append(event)
    run = Run.open(tmp_path / "run")
    list(run_plan(prepare(config, run), run))
    assert run.metrics() == whole.metrics
    assert [e.val_loss for e in run.history()] == [e.val_loss for e in whole.run.history()]
    for name in ("model.safetensors", "predictions.csv"):
        assert (run.path / name).read_bytes() == (whole.run.path / name).read_bytes()


def test_the_start_is_shown(cnnft, flat: Path, tmp_path: Path) -> None:
    outcome = cnnft(
        "finetune", flat, "--mode=finetune", "--backbone=builtin", "--epochs=1", "--workers=0",
        "--lr=1", "--head-lr=1e-9", "--runs-dir", tmp_path, "--image-size=32", "--batch-size=8",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    lines = [line.split() for line in outcome.err.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("start", "1/1")] == ["start", "1/1"]
    assert "the start, a linear probe: no epoch was better" in outcome.err
