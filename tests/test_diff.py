"""cnnft diff: what differs between two runs, and nothing that does not."""

import csv
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, draw, draw_folder
from scipy.stats import binomtest

import cnnft as package
from cnnft import finetune, load
from cnnft.models.hub import Pin
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]
WEIGHTS = Path(package.__file__).parent / "models" / "builtin" / "model.safetensors"


@pytest.fixture
def diff(cnnft: Cli) -> Callable[[Path, Path], dict[str, Any]]:
    def run(a: Path, b: Path) -> dict[str, Any]:
        outcome = cnnft("diff", a, b, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


def noisy(data: Path, runs: Path, **settings: Any) -> Path:
    """A run that is wrong about some images, from random weights if nothing else is asked for."""
    random = {"backbone": "test_resnet", "pretrained": False}
    return finetune(
        data,
        mode="feature-extractor",
        head_solver="sgd",
        epochs=2,
        workers=0,
        runs_dir=runs,
        **random | settings,
    ).path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on the same 40 validation images that are wrong about different ones."""
    folder = tmp_path_factory.mktemp("pair")
    data = draw_folder(folder / "data" / "train", ("ants", "bees"), 4).parent
    draw_folder(data / "val", ("ants", "bees"), 20, first_seed=100)
    better = noisy(data, folder, seed=1, backbone="builtin", pretrained=True, head_lr=0.01)
    return noisy(data, folder, seed=2), better


def rows_of(run: Path, name: str = "predictions.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def answer(row: dict[str, str]) -> str:
    """The class of the largest logit."""
    logits = {name: float(text) for name, text in row.items() if name.startswith("logit:")}
    return max(logits, key=logits.__getitem__).removeprefix("logit:")


# ---------------------------------------------------------------- what a run keeps


def test_val_predictions_are_those_that_scored_the_best_epoch(pair: tuple[Path, Path]) -> None:
    for run in pair:
        rows, metrics = rows_of(run), json.loads((run / "metrics.json").read_text())["val"]
        images = [row for row in rows_of(run, "data.csv") if row["split"] == "val"]
        for key, column in (("file", "file"), ("sha256", "sha256"), ("label", "class")):
            assert [row[key] for row in rows] == [row[column] for row in images]
        assert sum(row["label"] == answer(row) for row in rows) == metrics["correct"]
        assert 0 < metrics["correct"] < metrics["n"]
        told = load(run, device="cpu").predict([row["file"] for row in rows], workers=0)
        for row, prediction in zip(rows, told, strict=True):
            logits = torch.tensor([float(row[f"logit:{name}"]) for name in ("ants", "bees")])
            assert answer(row) == prediction.label
            assert logits.softmax(0).max().item() == pytest.approx(prediction.top[0][1], rel=1e-4)


def test_the_environment_is_that_of_the_run(trained: Path) -> None:
    kept = Run.open(trained).environment()
    assert kept["cnnft"] == package.__version__
    assert kept["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert kept["threads"] == str(torch.get_num_threads())


def test_the_weights_file_is_pinned(trained: Path) -> None:
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert Run.open(trained).description().pin == Pin(digest, place=None, commit=None)
    assert load(trained).pin.sha256 == digest


# ---------------------------------------------------------------- no difference


def test_a_run_does_not_differ_from_itself(cnnft: Cli, diff, trained: Path) -> None:
    lines = cnnft("diff", trained, trained).out.splitlines()
    for section in ("settings", "data", "network", "versions", "metrics"):
        assert any(line.split()[:3] == [section, "no", "difference"] for line in lines), section
    assert any("selected on val" in line for line in lines)
    found = diff(trained, trained)
    assert found["settings"] == found["network"] == found["versions"] == {}
    assert found["data"]["changed"] == []
    paired = found["paired"]
    assert (paired["n"], paired["difference"], paired["p"]) == (4, 0, 1)


def test_the_same_images_elsewhere_are_no_difference(diff, trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained.parents[1] / "data", tmp_path / "moved")
    again = finetune(
        moved, backbone="builtin", mode="feature-extractor",
        epochs=2, workers=0, head_lr=0.5,
        runs_dir=tmp_path, name="again",
    ).path  # fmt: skip
    found = diff(trained, again)
    assert found["settings"] == found["network"] == {} and found["data"]["changed"] == []
    assert found["metrics"]["a"] == found["metrics"]["b"]


# ---------------------------------------------------------------- differences


def test_settings_that_differ(diff, cnnft: Cli, trained: Path, finetuned: Path) -> None:
    expected = {
        "epochs": {"a": 2, "b": 1},
        "head_lr": {"a": 0.5, "b": None},
        "mode": {"a": "feature-extractor", "b": "finetune"},
        "probe_first": {"a": None, "b": False},
    }
    assert diff(trained, finetuned)["settings"] == expected
    lines = [line.split() for line in cnnft("diff", trained, finetuned).out.splitlines()]
    assert ["head_lr", "0.5", "default"] in lines


def test_images_that_differ_are_told_by_content(diff, cnnft: Cli, tmp_path: Path) -> None:
    one = draw_folder(tmp_path / "one" / "train", ("ants", "bees"), 6).parent
    draw_folder(one / "val", ("ants", "bees"), 4, first_seed=50)
    other = Path(shutil.copytree(one, tmp_path / "other"))
    (other / "train/ants/0.png").rename(other / "train/bees/was an ant.png")
    (other / "train/ants/1.png").rename(other / "val/ants/was in train.png")
    (other / "train/ants/2.png").rename(other / "train/ants/another name.png")
    (other / "train/ants/3.png").unlink()
    (other / "val/bees/0.png").unlink()
    shutil.copy(other / "train/bees/5.png", other / "train/bees/copy.png")
    draw(other / "val/bees/new.png", 1, 99)
    a, b = (noisy(data, tmp_path / "runs") for data in (one, other))

    found = diff(a, b)["data"]
    assert found["n"] == {"a": {"train": 12, "val": 8}, "b": {"train": 11, "val": 9}}
    assert found["only"] == {"a": {"train": 1, "val": 1}, "b": {"train": 1, "val": 1}}
    changed = {Path(change["file"]["b"]).name: change for change in found["changed"]}
    assert changed.keys() == {"was an ant.png", "was in train.png"}
    assert changed["was an ant.png"]["label"] == {"a": "ants", "b": "bees"}
    assert changed["was an ant.png"]["file"]["a"] == str(one / "train/ants/0.png")
    assert changed["was in train.png"]["split"] == {"a": "train", "b": "val"}
    back = diff(b, a)["data"]
    assert back["only"] == {"a": found["only"]["b"], "b": found["only"]["a"]}
    assert len(back["changed"]) == 2

    assert diff(a, b)["settings"]["data"] == {"a": str(one), "b": str(other)}
    paired = diff(a, b)["paired"]
    assert (paired["n"], paired["not_shared"]) == (7, {"a": 1, "b": 2})
    lines = cnnft("diff", a, b).out.splitlines()
    assert ["not", "in", "other", "1", "1"] in [line.split() for line in lines]
    assert any("was an ant.png: train/ants in A, train/bees in B" in line for line in lines)


def test_the_paired_test_counts_images(diff, cnnft: Cli, pair: tuple[Path, Path]) -> None:
    right = [{row["sha256"] for row in rows_of(run) if row["label"] == answer(row)} for run in pair]
    only = len(right[0] - right[1]), len(right[1] - right[0])
    assert 0 < only[0] < only[1], "choose runs that differ"
    found = diff(*pair)["paired"]
    assert (found["n"], found["not_shared"]) == (40, {"a": 0, "b": 0})
    assert found["correct"] == {"a": len(right[0]), "b": len(right[1])}
    assert found["only_right"] == {"a": only[0], "b": only[1]}
    assert found["difference"] == pytest.approx((len(right[1]) - len(right[0])) / 40)
    low, high = found["interval95"]
    assert low < found["difference"] < high
    assert found["p"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert "selected on val" in found["note"]
    out = cnnft("diff", *pair).out
    assert f"right in A only: {only[0]}, in B only: {only[1]}" in out
    assert "selected on val" in out and f"{100 * found['difference']:+.1f} points" in out


def test_copies_of_one_image_count_once(diff, pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pair[0].parent / "data", data)
    shutil.copy(data / "val/ants/0.png", data / "val/ants/copy.png")
    run = noisy(data, tmp_path, seed=1)
    assert Counter(row["sha256"] for row in rows_of(run)).most_common(1)[0][1] == 2
    found = diff(pair[0], run)
    assert (found["paired"]["n"], found["paired"]["not_shared"]) == (40, {"a": 0, "b": 0})
    assert found["data"]["only"]["b"] == {"train": 0, "val": 1}


def test_nothing_shared_is_nothing_to_test(
    diff, cnnft: Cli, trained: Path, pair: tuple[Path, Path]
) -> None:
    assert diff(trained, pair[0])["paired"] is None
    assert "nothing to test" in cnnft("diff", trained, pair[0]).out


def test_weights_and_versions_that_differ(diff, cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    description = json.loads((other / "config.json").read_text())
    description["cnnft"]["weights_file"] |= {"place": "timm/x", "commit": "0" * 40}
    (other / "config.json").write_text(json.dumps(description))
    kept = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps(kept | {"torch": "2.9.0"}))
    found = diff(trained, other)
    assert found["network"] == {
        "weights place": {"a": None, "b": "timm/x"},
        "weights commit": {"a": None, "b": "0" * 40},
    }
    assert found["versions"] == {"torch": {"a": kept["torch"], "b": "2.9.0"}}
    lines = [line.split() for line in cnnft("diff", trained, other).out.splitlines()]
    assert ["torch", kept["torch"], "2.9.0"] in lines


def test_of_a_run_from_before_it_says_what_is_unknown(
    diff, cnnft: Cli, trained: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    (old / "predictions.csv").unlink()
    (old / "environment.json").unlink()
    description = json.loads((old / "config.json").read_text())
    del description["cnnft"]["weights_file"]
    (old / "config.json").write_text(json.dumps(description))
    found = diff(trained, old)
    assert found["versions"] is None and found["paired"] is None
    assert found["unknown"] == {"versions": [str(old)], "predictions": [str(old)]}
    assert found["network"]["weights sha256"]["b"] is None
    out = cnnft("diff", trained, old).out
    assert out.count(f"unknown: {old} made before runs kept them") == 2
    assert load(old).pin is None
