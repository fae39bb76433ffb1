"""What a terminal shows while the commands work."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from rich.console import Console

from cnnft.cli import console
from cnnft.cli.training import Forecast

Cli = Callable[..., Outcome]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is drawn on standard error, were it a terminal."""
    drawn = io.StringIO()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(console, "screen", Console(file=drawn, force_terminal=True, width=100))
    return drawn


def test_finetune_draws_steps_and_validation(
    cnnft: Cli, terminal: io.StringIO, flat: Path, tmp_path: Path
) -> None:
    arguments = (
        "--backbone=builtin",
        "--mode=feature-extractor",
        "--head-solver=sgd",
        "--epochs=2",
        "--workers=0",
    )
    assert cnnft("finetune", flat, "--runs-dir", tmp_path, *arguments).code == 0
    shown = terminal.getvalue()
    for task in ("checking the images", "training", "validating"):
        assert task in shown


@pytest.mark.parametrize(
    ("arguments", "tasks"),
    [
        (("evaluate", "DATA"), ("checking the images", "evaluating", "20/20", "4/4")),
        (("predict", "DATA"), ("predicting", "20/20")),
        (("export", "RUN", "--format=safetensors"), ("exporting safetensors",)),
    ],
    ids=lambda value: value[0],
)
def test_what_takes_time_is_drawn(
    cnnft: Cli,
    terminal: io.StringIO,
    trained: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    tasks: tuple[str, ...],
) -> None:
    places = {"DATA": trained.parents[1] / "data", "RUN": trained}
    more = ("--output", tmp_path / "x") if "export" in arguments else ("-m", trained)
    outcome = cnnft(*(places.get(argument, argument) for argument in arguments), *more)
    assert outcome.code == 0
    for task in tasks:
        assert task in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(0.01, False), (3.0, True)])
def test_long_training_is_forecast_once(
    monkeypatch: pytest.MonkeyPatch, seconds: float, said: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("cnnft.cli.training.console.say", lines.append)
    forecast = Forecast()
    for step in range(1, 101):
        now = 1000 + seconds * step
        monkeypatch.setattr("cnnft.cli.training.time.monotonic", lambda now=now: now)
        forecast.step(step, 100)
    assert [line[:38] for line in lines] == ["training takes about 5 minutes more; a"] * said
