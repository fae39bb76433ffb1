"""Schedules against torch's, and their picture."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from PIL import Image
from torch.optim import lr_scheduler as theirs

from cnnft.config.optimization import ScheduleConfig
from cnnft.training.schedules import Length, make_schedule, one_cycle, plateau

EPOCHS, STEPS = 30, 4
Optimizer = torch.optim.Optimizer


def optimizer() -> Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(make: Callable[[Optimizer], theirs.LRScheduler], steps: int) -> list[float]:
    """What torch's scheduler makes of a rate of 1, if it is told of every step."""
    of = optimizer()
    scheduler, found = make(of), []
    for _ in range(steps):
        found.append(of.param_groups[0]["lr"])
        of.step()
        scheduler.step()
    return found


ORACLES: dict[str, tuple[dict[str, object], Callable[[Optimizer, int], theirs.LRScheduler]]] = {
    # (settings, (optimizer, steps) -> torch's)
    "constant": ({}, lambda o, n: theirs.ConstantLR(o, factor=1.0)),
    "step": ({"step_epochs": 7}, lambda o, n: theirs.StepLR(o, 7 * STEPS, 0.1)),
    "multistep": (
        {"milestones": "10,20,27.5", "step_gamma": 0.5},
        lambda o, n: theirs.MultiStepLR(o, [10 * STEPS, 20 * STEPS, 110], 0.5),
    ),
    "exponential": (
        {"step_epochs": 3, "step_gamma": 0.5},
        lambda o, n: theirs.ExponentialLR(o, 0.5 ** (1 / (3 * STEPS))),
    ),
    "inverse": (
        {"inverse_epochs": 2.5},
        lambda o, n: theirs.LambdaLR(o, lambda step: 10 / (10 + step)),
    ),
    "cosine": ({}, lambda o, n: theirs.CosineAnnealingLR(o, n)),
    "cosine-restarts": (
        {"restart_epochs": 3, "restart_multiplier": 2},
        lambda o, n: theirs.CosineAnnealingWarmRestarts(o, 3 * STEPS, 2),
    ),
    "one-cycle": (
        {"cycle_rise": 0.3},
        lambda o, n: theirs.OneCycleLR(o, 1.0, total_steps=n, pct_start=0.3, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_schedules_equal_torchs(name):
    settings, oracle = ORACLES[name]
    ours = make_schedule(ScheduleConfig(schedule=name, **settings), Length(EPOCHS, STEPS))
    steps = EPOCHS * STEPS - (name == "one-cycle")  # torch's refuses to be told of the last step
    expected = rates(lambda o: oracle(o, EPOCHS * STEPS), steps)
    assert [ours(step) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.25, 2.5, 29.75])
@pytest.mark.parametrize("name", ["constant", "step", "exponential", "inverse", "cosine"])
def test_the_schedule_begins_at_the_full_rate_where_the_warmup_ends(name, warmup):
    settings, oracle = ORACLES[name]
    config = ScheduleConfig(schedule=name, warmup_epochs=warmup, **settings)
    ours = make_schedule(config, Length(EPOCHS, STEPS))
    total, first = EPOCHS * STEPS, round(warmup * STEPS)

    def expected(o: Optimizer) -> theirs.LRScheduler:
        warm = theirs.LinearLR(o, start_factor=1 / (first + 1), total_iters=first)
        return theirs.SequentialLR(o, [warm, oracle(o, total - first)], milestones=[first])

    assert ours(first) == 1
    assert [ours(step) for step in range(total)] == pytest.approx(rates(expected, total), abs=1e-12)


def test_milestones_count_from_the_start_of_training():
    config = ScheduleConfig(schedule="multistep", milestones="2,5", warmup_epochs=1)
    ours = make_schedule(config, Length(6, 2))
    assert [round(ours(step), 9) for step in range(12)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1] + 6 * [0.1] + 2 * [0.01]
    )
    of_all = make_schedule(ScheduleConfig(schedule="multistep"), Length(4, 1))
    assert [round(of_all(step), 9) for step in range(4)] == [1, 1, 0.1, 0.01]


def test_inverse_sqrt_is_the_transformers_where_it_is_as_slow_as_the_warmup():
    """min(s ** -0.5, s * w ** -1.5) for s from 1 (Vaswani et al., 2017), but for its height."""
    config = ScheduleConfig(schedule="inverse-sqrt", warmup_epochs=5, inverse_epochs=5.25)
    ours, w = make_schedule(config, Length(EPOCHS, STEPS)), 5 * STEPS + 1
    expected = [min(s**-0.5, s * w**-1.5) * w**0.5 for s in range(1, EPOCHS * STEPS + 1)]
    assert [ours(step) for step in range(EPOCHS * STEPS)] == pytest.approx(expected)


def test_three_cosines_fill_the_training_where_no_length_is_given():
    ours = make_schedule(ScheduleConfig(schedule="cosine-restarts"), Length(7, 10))
    full = [step for step in range(70) if ours(step) == pytest.approx(1)]
    assert full == [0, 10, 30] and ours(69) < 0.01
    again = make_schedule(
        ScheduleConfig(schedule="cosine-restarts", restart_epochs=0.3, restart_multiplier=1),
        Length(25, 10),
    )
    assert [again(step) for step in range(6)] == pytest.approx([1, 0.75, 0.25] * 2)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_one_cycle_of_few_steps_stays_between_nothing_and_the_whole(total):
    assert all(0 <= one_cycle(step, total, 0.3) <= 1 for step in range(total))


# ---------------------------------------------------------------- plateau


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_equals_torchs(patience):
    losses = (torch.rand(40, generator=torch.Generator().manual_seed(patience)) + 0.5).tolist()
    of = optimizer()
    scheduler = theirs.ReduceLROnPlateau(of, factor=0.3, patience=patience, eps=0)
    for n, loss in enumerate(losses, start=1):
        scheduler.step(loss)
        assert plateau(losses[:n], 0.3, patience) == pytest.approx(of.param_groups[0]["lr"])


def test_plateau_looks_at_no_epoch_that_a_step_could_not_know_and_at_none_of_the_warmup():
    config = ScheduleConfig(schedule="plateau", plateau_patience=0, warmup_epochs=0.5)
    ours, losses = make_schedule(config, Length(6, 2)), [0.1, 3.0, 4.0, 2.0, 5.0, 6.0]
    found = [round(ours(step, losses), 9) for step in range(12)]
    assert found == [0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert found == [round(ours(step, losses[: step // 2]), 9) for step in range(12)]


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_dry_run_draws_the_schedule(cnnft: Callable[..., Outcome], flat: Path, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"rates.{suffix}"
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--no-probe-first", "--workers=0", "--dry-run",
        "--warmup-epochs=2", "--optimizer=adamw", "--weight-decay=0.1", "--plot-schedule", path,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "cosine schedule after a warmup (epochs: 2), adamw, weight decay 0.1" in outcome.err
    if suffix == "png":
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(100_000)) > 10  # two colours, and their edges
    else:
        assert path.read_text().count("<svg") == 1


def test_without_matplotlib_the_extra_is_named(
    cnnft: Callable[..., Outcome], flat: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cnnft("finetune", flat, "--backbone=builtin", "--dry-run", "--plot-schedule=a.png")
    outcome.fails_with(1, "--plot-schedule", "cnnft[plot]")
