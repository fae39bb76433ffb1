"""What the flags of several parts do together: layouts, heads, resuming, averaging."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, draw_folder

from cnnft.runs.run import Run

Cli = Callable[..., Outcome]


@pytest.fixture
def train(cnnft: Cli, tmp_path: Path) -> Cli:
    def run(data: Path, *arguments: object) -> Outcome:
        return cnnft(
            "finetune", data, "--backbone=builtin", "--mode=feature-extractor",
            "--head-solver=sgd", "--epochs=1",
            "--workers=0", "--device=cpu", "--image-size=32", "--runs-dir", tmp_path / "runs",
            "--name=run", *arguments,
        )  # fmt: skip

    return run


def classes_of(run: Path) -> tuple[str, ...]:
    return Run.open(run).description().classes


# ---------------------------------------------------------------- layouts


@pytest.fixture
def vehicles(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "vehicles", ("bus", "car", "train"), 6)


@pytest.fixture
def class_split(tmp_path: Path) -> Path:
    """DATA/CLASS/train and DATA/CLASS/val."""
    for label, name in enumerate(("ants", "bees")):
        drawn = draw_folder(tmp_path / "drawn", ("ants", "bees"), 9, first_seed=label * 10)
        for n in range(9):
            target = tmp_path / "class-split" / name / ("train" if n < 6 else "val") / f"{n}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn / name / f"{n}.png", target)
    return tmp_path / "class-split"


@pytest.mark.parametrize("flags", [(), ("--layout=flat",)])
def test_a_class_may_be_called_train(train: Cli, vehicles: Path, tmp_path: Path, flags) -> None:
    outcome = train(vehicles, *flags)
    assert outcome.code == 0, outcome.err
    assert classes_of(tmp_path / "runs" / "run") == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("fixture", "layout", "images"),
    [("class_split", "class-split", 18), ("separated", "split", 27)],
)
def test_layouts_that_are_named(
    cnnft: Cli, train: Cli, request, tmp_path: Path, fixture: str, layout: str, images: int
) -> None:
    data, flag = request.getfixturevalue(fixture), f"--layout={layout}"
    run = tmp_path / "runs" / "run"
    outcome = train(data, flag)
    assert outcome.code == 0, outcome.err
    assert Run.open(run).config().dataset.layout == layout
    val = Run.open(run).metrics().val.n
    assert val == images // 3
    found = cnnft("evaluate", data, "-m", run, flag, "--workers=0", "--json")
    assert found.code == 0 and json.loads(found.out)["n"] == val
    found = cnnft("check", data, flag, "--workers=0", "--json")
    counts = json.loads(found.out)["counts"]
    assert sum(sum(of.values()) for of in counts.values()) == images


@pytest.mark.parametrize(
    ("layout", "code", "part"),
    [("split", 1, "train"), ("class-split", 1, "train"), ("tree", 2, "--layout")],
)
def test_layouts_that_are_not_there(
    cnnft: Cli, train: Cli, flat: Path, tmp_path: Path, layout: str, code: int, part: str
) -> None:
    train(flat, f"--layout={layout}").fails_with(code, part)
    cnnft("check", flat, f"--layout={layout}").fails_with(code, part)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            (
                "--mode=feature-extractor",
                "--head-solver=sgd",
            ),
            ["head new, default initialisation"],
        ),
        (("--mode=finetune",), ["head linear probe, cross-validated train accuracy"]),
        (
            ("--mode=finetune", "--focal=2", "--label-smoothing=0.1"),
            ["head linear probe", "it ignores --focal and --label-smoothing"],
        ),
        (("--mode=finetune", "--no-probe-first", "--focal=2"), ["head new"]),
    ],
)
def test_the_summary_says_where_the_head_comes_from(
    train: Cli, flat: Path, flags: tuple[str, ...], lines: list[str]
) -> None:
    outcome = train(flat, "--dry-run", *flags)
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.err.split())
    assert all(line in said for line in lines), outcome.err
    assert ("ignores" in said) == ("ignores" in " ".join(lines))


# ---------------------------------------------------------------- resuming, averaging


def test_resume_takes_the_settings_that_the_run_has(
    cnnft: Cli, train: Cli, trained: Path, flat: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    assert train(flat, "--teacher", trained).code == 0
    resumed = cnnft("finetune", "--resume", run, "--teacher", trained, "--epochs=2")
    assert resumed.code == 0, resumed.err
    assert "head            from the checkpoint" in resumed.err
    again = cnnft("finetune", "--resume", run, "--teacher", trained, "--teacher", trained)
    again.fails_with(2, "teacher")


def test_swa_cannot_begin_inside_the_warmup(train: Cli, flat: Path) -> None:
    flags = ("--epochs=5", "--warmup-epochs=2.5")
    train(flat, "--swa=3", *flags).fails_with(2, "--swa 3", "warmup", "to 2 at most")
    assert train(flat, "--swa=2", *flags, "--dry-run").code == 0
