"""run.log: what a support question can be answered from."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome

from cnnft.cli import console
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d  (.*)")


@pytest.fixture
def train(cnnft: Cli, flat: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        return cnnft(
            "finetune", flat, "--backbone=builtin", "--mode=feature-extractor",
            "--head-solver=sgd", "--epochs=1",
            "--workers=0", "--device=cpu", "--runs-dir", tmp_path, "--name=x", *arguments,
        )  # fmt: skip

    return run


def logged(folder: Path) -> list[str]:
    lines = (folder / "x" / "run.log").read_text().splitlines()
    return [STAMP.fullmatch(line)[1] for line in lines]


@pytest.mark.parametrize("quiet", [False, True])
def test_the_log_holds_all_that_was_said_below_command_and_environment(
    train, flat: Path, tmp_path: Path, quiet: bool
) -> None:
    (flat / "ants" / "broken.png").write_bytes(b"no image")
    outcome = train(*["--quiet"] * quiet)
    first, *lines = logged(tmp_path)
    command, _, environment = first.partition("  (")
    assert shlex.split(command)[:3] == ["cnnft", "finetune", str(flat)]
    assert f"torch {torch.__version__.partition('+')[0]}" in environment
    assert "device cpu" in environment
    assert any(line.startswith("warning: skipped") for line in lines)
    assert any(line.startswith("mode            feature-extractor") for line in lines)
    if not quiet:
        assert lines == [line.rstrip() for line in outcome.err.splitlines() if line.strip()]


def test_resume_appends(cnnft: Cli, train, tmp_path: Path) -> None:
    train()
    before = logged(tmp_path)
    assert cnnft("finetune", "--resume", tmp_path / "x", "--epochs=2").code == 0
    after = logged(tmp_path)
    assert after[: len(before)] == before
    assert after[len(before)].startswith(f"cnnft finetune --resume {tmp_path / 'x'} --epochs=2  (")
    assert sum(line.startswith("best epoch") for line in after) == 2


def test_the_error_that_ends_a_run_is_its_last_line(train, tmp_path: Path) -> None:
    outcome = train("--mode=finetune", "--lr=1e30")
    assert outcome.code == 1
    assert logged(tmp_path)[-1] == outcome.err.splitlines()[-1].rstrip()
    assert logged(tmp_path)[-1].startswith("error: training diverged")


def test_of_a_bug_the_log_keeps_the_traceback(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *arguments: 1 // 0)
    assert train().code == 1
    assert "Traceback (most recent call last):" in logged(tmp_path)
    assert "this is a bug" in logged(tmp_path)[-1]


def test_another_command_does_not_write_into_the_log(cnnft: Cli, train, tmp_path: Path) -> None:
    train()
    before = logged(tmp_path)
    assert cnnft("evaluate", "nowhere", "-m", tmp_path / "x").code == 2
    assert logged(tmp_path) == before


def test_a_dry_run_has_no_log(train, tmp_path: Path) -> None:
    assert train("--dry-run").code == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_costs_the_log_and_not_the_run(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "log", Path("/dev/full"))
    outcome = train()
    assert outcome.code == 0 and "best epoch 1" in outcome.err
    assert "warning" not in outcome.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_results_that_cannot_be_written_are_an_error() -> None:
    command = [sys.executable, "-m", "cnnft", "backbones", "resnet18"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "error: standard output cannot be written: No space left on device\n"
    assert (process.returncode, process.stderr) == (1, message)


def test_a_log_in_a_folder_that_is_gone_is_lost(tmp_path: Path) -> None:
    with console.speaking(["x"]):
        console.log_to(tmp_path / "gone" / "run.log", "")
        console.say("lost")
    assert not (tmp_path / "gone").exists()
