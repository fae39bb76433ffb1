"""Runs whose head is solved: logistic regression on frozen features, scored out of fold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, draw_folder
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cnnft import Config, load
from cnnft.data.images import read_image
from cnnft.data.loading import ImageFiles
from cnnft.data.transforms import evaluation_crop
from cnnft.runs.run import Run
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]

FROZEN = ("--mode=feature-extractor", "--backbone=builtin", "--workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("solved") / "data", ("ants", "bees", "wasps"), 7)


@pytest.fixture
def solve(cnnft: Cli, tmp_path: Path) -> Callable[..., Run]:
    def run(data: Path, *flags: object) -> Run:
        outcome = cnnft("finetune", data, *FROZEN, "--runs-dir", tmp_path, *flags)
        assert outcome.code == 0, outcome.err
        return Run.open(outcome.out.strip())

    return run


def test_all_images_are_trained_on_and_scored_out_of_fold(data: Path, solve: Callable[..., Run]):
    run = solve(data, "--folds=3")
    splits, predictions = run.dataset().splits, run.predictions()
    assert (len(splits["train"]), len(splits["val"])) == (21, 0)
    assert predictions is not None and predictions.role == "out-of-fold"
    assert sorted(predictions.samples.hashes) == sorted(splits["train"].hashes)
    assert set(predictions.folds) == {0, 1, 2}
    assert run.metrics().val == predictions.score()
    assert run.metrics().best_epoch is None
    assert not (run.path / "history.csv").exists()


def test_the_chosen_penalty_has_the_lowest_loss(data: Path, solve: Callable[..., Run]):
    run = solve(data)
    penalties, predictions = run.penalties(), run.predictions()
    assert penalties is not None and predictions is not None
    (chosen,) = [row for row in penalties if row.chosen]
    assert chosen.calibrated_loss == min(row.calibrated_loss for row in penalties)
    assert len({(row.features, row.penalty) for row in penalties}) == len(penalties) >= 4
    assert {row.features for row in penalties} == {"last", "stages"}
    assert bool(run.description().stages) == (chosen.features == "stages")
    assert chosen.accuracy == pytest.approx(predictions.score().accuracy)


def test_the_head_is_the_logistic_regression_on_both_mirror_images(
    data: Path, solve: Callable[..., Run]
):
    run = solve(data, "--features=last")
    classifier, (train, _) = load(run.path), run.dataset().splits.values()
    pixels = torch.stack([classifier.preprocess(read_image(path)) for path in train.paths])
    with torch.no_grad():
        rows = torch.cat([classifier.embed(pixels), classifier.embed(pixels.flip(3))]).double()
        logits = classifier.forward(pixels)
    labels = np.tile(train.labels, 2)
    (penalty,) = [row.penalty for row in run.penalties() or () if row.chosen]
    scaler = StandardScaler().fit(rows)
    # Features that hardly vary are scaled by less than their standard deviation.
    spread = 0.01 * float(np.sqrt(np.mean(scaler.var_)))
    x = (rows.numpy() - scaler.mean_) / np.maximum(np.sqrt(scaler.var_), spread)
    oracle = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit(x, labels)
    expected = oracle.predict_proba(x[: len(train)])
    np.testing.assert_allclose(logits.softmax(dim=1), expected, atol=2e-3)


def test_a_val_folder_is_held_out_and_selects_nothing(separated: Path, solve: Callable[..., Run]):
    run = solve(separated)
    metrics, predictions = run.metrics(), run.predictions()
    assert predictions is not None and predictions.role == "val"
    assert len(run.dataset().splits["val"]) == metrics.val.n == len(predictions.samples)
    assert metrics.evidence == "not selected on val"


def test_evaluate_shows_the_score_out_of_fold(cnnft: Cli, data: Path, solve: Callable[..., Run]):
    run = solve(data)
    outcome = cnnft("evaluate", data, "-m", run.path, "--workers=0", "--json")
    found = json.loads(outcome.out)
    assert found["out_of_fold"] and found["n"] == 21
    assert found["accuracy"] == run.metrics().val.accuracy
    text = cnnft("evaluate", data, "-m", run.path, "--workers=0").out
    assert "out of fold" in text and "fitted on the other folds" in text


def test_the_same_run_again_has_the_same_bytes(data: Path, solve: Callable[..., Run]):
    one, two = solve(data, "--name=one"), solve(data, "--name=two", "--seed=5")
    for name in ("model.safetensors", "predictions.csv", "penalties.csv", "metrics.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name


def test_each_image_is_decoded_once_for_both_mirror_images(
    data: Path, solve: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    monkeypatch.setattr(
        ImageFiles,
        "cropped",
        lambda images, image: read.append("") or evaluation_crop(image, images.crop),
    )
    solve(data)
    assert len(read) == 21


def test_a_solved_run_can_be_resumed(cnnft: Cli, data: Path, solve: Callable[..., Run]):
    run = solve(data)
    before = (run.path / "model.safetensors").read_bytes()
    (run.path / "model.safetensors").unlink()  # as if it had been killed before it was written
    outcome = cnnft("finetune", "--resume", run.path)
    assert outcome.code == 0, outcome.err
    assert (run.path / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_class_weights_change_the_head(data: Path, tmp_path: Path, solve: Callable[..., Run]):
    uneven = tmp_path / "uneven"
    shutil.copytree(data, uneven)
    for file in sorted((uneven / "wasps").iterdir())[3:]:
        file.unlink()
    plain, weighted = solve(uneven), solve(uneven, "--class-weights=balanced")
    assert plain.metrics().train.loss != weighted.metrics().train.loss


@pytest.mark.parametrize(
    ("flags", "solver"),
    [
        ((), "auto"),
        (("--class-weights=balanced",), "auto"),
        (("--head-lr=0.1",), "steps"),
        (("--mixup=0.2",), "steps"),
        (("--augment=strong",), "steps"),
        (("--head-solver=sgd",), "steps"),
        (("--head=mlp",), "steps"),
    ],
)
def test_options_about_steps_mean_steps(
    cnnft: Cli, data: Path, tmp_path: Path, flags: tuple[str, ...], solver: str
):
    outcome = cnnft(
        "finetune", data, *FROZEN, "--dry-run", "--json", "--runs-dir", tmp_path, *flags
    )
    assert json.loads(outcome.out)["head"] == ("solver" if solver == "auto" else "new")
    if solver == "steps" and flags != ("--head-solver=sgd",):
        assert f"trained by steps, which {flags[0].partition('=')[0]} is about" in outcome.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--head-solver=lbfgs", "--mixup=0.2"), "which --mixup is about"),
        (("--head-solver=lbfgs", "--mode=finetune"), "add --mode feature-extractor"),
        (("--head-solver=sgd", "--features=stages"), "leave out --head-solver sgd"),
        (("--mixup=0.2", "--features=stages"), "leave out --mixup"),
        (("--mode=finetune", "--features=stages"), "add --mode feature-extractor"),
        (("--folds=1",), "--folds 1 is out of range"),
    ],
)
def test_what_cannot_go_together(cnnft: Cli, data: Path, flags: tuple[str, ...], said: str):
    cnnft("finetune", data, *FROZEN, *flags).fails_with(2, said)


def test_a_head_that_is_a_convolution_is_trained_by_steps(data: Path, tmp_path: Path):
    settings = {"mode": "feature-extractor", "backbone": "torchvision/squeezenet1_1"}
    settings |= {"pretrained": False, "workers": 0, "runs_dir": tmp_path, "image_size": 64}
    assert prepare(Config.of(data, **settings)).config.freezing.head_solver == "sgd"
    with pytest.raises(Exception, match="no single linear layer"):
        prepare(Config.of(data, head_solver="lbfgs", **settings))
    with pytest.raises(Exception, match="--features stages: this backbone's classifier is no"):
        prepare(Config.of(data, features="stages", **settings))


def test_fewer_images_than_folds(cnnft: Cli, tmp_path: Path, solve: Callable[..., Run]):
    few = draw_folder(tmp_path / "few", ("ants", "bees"), 2)
    draw_folder(few, ("wasps",), 1, first_seed=50)
    run = solve(few, "--folds=5")
    predictions = run.predictions()
    assert predictions is not None and len(predictions.samples) == run.metrics().val.n == 4
    assert len(run.dataset().splits["train"]) == 5
    log = (run.path / "run.log").read_text()
    assert "1 class(es) have a single image, so they are trained and have no score: wasps" in log


def test_single_images_are_refused_in_a_sentence(cnnft: Cli, tmp_path: Path):
    single = draw_folder(tmp_path / "single", ("ants", "bees"), 1)
    outcome: Outcome = cnnft("finetune", single, *FROZEN, "--runs-dir", tmp_path)
    outcome.fails_with(1, "no class has two different images")


def test_copies_are_in_one_fold(tmp_path: Path, solve: Callable[..., Run]):
    copied = draw_folder(tmp_path / "copied", ("ants", "bees"), 5)
    for file in sorted(copied.glob("*/*"))[::2]:
        shutil.copy(file, file.with_stem(f"{file.stem} again"))
    predictions = solve(copied).predictions()
    assert predictions is not None
    folds: dict[str, set[int]] = {}
    for digest, fold in zip(predictions.samples.hashes, predictions.folds, strict=True):
        folds.setdefault(digest, set()).add(fold)
    assert all(len(found) == 1 for found in folds.values())
