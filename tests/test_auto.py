"""--mode auto: the solved head, unless a network that was trained too is clearly better."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, draw_folder

from cnnft import Config, load
from cnnft.data.dataset import Samples
from cnnft.errors import UsageError
from cnnft.inference.predict import mean_probability
from cnnft.inference.predictions import Predictions
from cnnft.runs.run import Run
from cnnft.training import auto
from cnnft.training.auto import compare
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone

Cli = Callable[..., Outcome]

SMALL = {"mode": "auto", "backbone": "builtin", "epochs": 1, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the images lie under the wrong class, so that no head is perfect."""
    data = draw_folder(tmp_path_factory.mktemp("noisy") / "data", ("ants", "bees"), 16)
    for number in range(0, 16, 4):
        one, other = (data / name / f"{number}.png" for name in ("ants", "bees"))
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
    return data


def settings(data: Path, folder: Path, **more: object) -> Config:
    return Config.of(data, **SMALL | {"runs_dir": folder, "name": "run", "image_size": 64} | more)


def train(config: Config) -> Run:
    for event in run_plan(prepare(config)):
        finished = event
    return finished.run


@pytest.fixture(scope="module")
def ensemble(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(noisy, tmp_path_factory.mktemp("ensemble"), ensemble=True)).path


# ---------------------------------------------------------------- what is the answer


def test_where_all_is_right_nothing_is_trained(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    flags = ("--mode=auto", "--backbone=builtin", "--workers=0", "--runs-dir", tmp_path)
    outcome = cnnft("finetune", flat, *flags, "--name=auto")
    assert outcome.code == 0, outcome.err
    assert "→ " in outcome.err and "10 training images per class" in outcome.err
    assert "too few images are wrong" in outcome.err
    assert not (tmp_path / "auto" / "candidates").exists()
    frozen = cnnft("finetune", flat, *flags[1:], "--mode=feature-extractor", "--name=frozen")
    assert frozen.code == 0
    for name in ("model.safetensors", "predictions.csv", "metrics.json"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("auto", "frozen"))
        assert one == other, name


def test_a_network_that_is_not_clearly_better_leaves_the_head(noisy: Path, tmp_path: Path) -> None:
    run = train(settings(noisy, tmp_path))
    found, other = run.comparison(), Run.open(run.path / "candidates" / "last-stages")
    assert found is not None and found.answer == "head"
    assert found.difference <= 2 * found.standard_error
    assert found.trained_loss == pytest.approx(other.metrics().val.loss, rel=1e-5)
    assert run.metrics().best_epoch is None and run.penalties()
    predictions = run.predictions()
    assert predictions is not None and predictions.role == "out-of-fold"
    assert run.config().freezing.mode == "auto"  # so that --config does the same again


def test_a_network_that_is_clearly_better_is_the_answer(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_STANDARD_ERRORS", -100)
    run = train(settings(noisy, tmp_path))
    other = Run.open(run.path / "candidates" / "last-stages")
    assert run.metrics() == other.metrics() and run.history() == other.history()
    assert dict(run.dataset().splits) == dict(other.dataset().splits)
    assert len(run.dataset().splits["val"]) == run.metrics().val.n
    paths = run.dataset().splits["val"].paths
    assert load(run.path).predict(paths) == load(other.path).predict(paths)
    before = (run.path / "model.safetensors").read_bytes()
    list(run_plan(prepare(run.config(), run), run))  # it is over
    assert (run.path / "model.safetensors").read_bytes() == before


def test_a_network_that_cannot_be_trained_leaves_the_head(
    cnnft: Cli, noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(auto.CANDIDATE, "lr", 1e30)
    outcome = cnnft(
        "finetune", noisy, "--backbone=builtin", "--workers=0", "--epochs=2", "--device=cpu",
        "--image-size=64", "--runs-dir", tmp_path,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "warning: the head is kept: " in outcome.err
    run = Run.open(outcome.out.strip())
    assert run.comparison() is None and run.metrics().best_epoch is None


def test_there_are_fewer_stages_than_the_recipe_trains(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(auto.CANDIDATE, "train_stages", 99)
    assert train(settings(noisy, tmp_path)).comparison() is not None


def test_the_comparison_is_paired() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    logits = 3 * torch.randn(40, 2)
    names = tuple(f"{i}.png" for i in range(40))
    samples = Samples(paths=names, labels=tuple(labels.tolist()), classes=("a", "b"), hashes=names)
    better = logits.clone()
    better[torch.arange(40), labels] += 0.5
    found = compare(logits, Predictions(samples, better, "val"))
    losses = [
        torch.nn.functional.cross_entropy(of.double(), labels, reduction="none").numpy()
        for of in (logits, better)
    ]
    difference = losses[0] - losses[1]
    assert found.difference == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(40))
    assert found.answer == "trained"
    assert compare(better, Predictions(samples, logits, "val")).answer == "head"
    assert compare(logits, Predictions(samples, logits, "val")).answer == "head"


# ---------------------------------------------------------------- ensembles


def test_an_ensemble_averages_probabilities(ensemble: Path, noisy: Path) -> None:
    classifier = load(ensemble, device="cpu")
    (member,) = classifier.members
    trained = load(ensemble / member.folder, device="cpu")
    paths = sorted(noisy.glob("*/*.png"))[::5]
    head_alone = json.loads((ensemble / "config.json").read_text())
    head_alone["cnnft"]["members"] = []
    copy = ensemble.parent / "alone"
    shutil.copytree(ensemble, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps(head_alone))
    both = [load(path, device="cpu") for path in (copy, ensemble / member.folder)]
    parts = [[dict(answer.top) for answer in of.predict(paths)] for of in both]
    for answer, *own in zip(classifier.predict(paths), *parts, strict=True):
        for name, probability in answer.top:
            expected = np.average([one[name] for one in own], weights=[2, 1])
            assert probability == pytest.approx(expected, abs=1e-5)
    assert trained.temperature != 1 and classifier.temperature == 1
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier.embed(pixels), both[0].embed(pixels))


def test_the_mean_is_weighted() -> None:
    logits = [torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]])]
    expected = 0.3 * logits[0].softmax(1) + 0.7 * logits[1].softmax(1)
    torch.testing.assert_close(mean_probability(logits, [0.3, 0.7]).exp(), expected)


def test_an_ensemble_is_scored_and_exported(cnnft: Cli, ensemble: Path, noisy: Path) -> None:
    run = Run.open(ensemble)
    predictions, found = run.predictions(), run.comparison()
    assert found is not None and found.answer == "ensemble"
    assert predictions is not None and predictions.role == "out-of-fold"
    assert run.metrics().val == predictions.score() and run.metrics().val.n == found.n
    outcome = cnnft("evaluate", noisy, "-m", ensemble, "--json", "--workers=0")
    assert json.loads(outcome.out)["n"] == found.n, outcome.err
    cnnft("export", ensemble, "--format=head").fails_with(2, "an ensemble of 2 networks", "onnx")
    pytest.importorskip("onnxruntime")
    file = ensemble.parent / "model.onnx"
    assert cnnft("export", ensemble, "--format=onnx", "--output", file).code == 0


@pytest.mark.parametrize("folder", ["../x", "/etc", "", "candidates/none"])
def test_members_outside_the_run_are_refused(
    cnnft: Cli, ensemble: Path, noisy: Path, folder: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(ensemble, run)
    described = json.loads((run / "config.json").read_text())
    described["cnnft"]["members"][0]["folder"] = folder
    (run / "config.json").write_text(json.dumps(described))
    cnnft("predict", next(noisy.glob("*/*.png")), "-m", run).fails_with(1, "config.json")


# ---------------------------------------------------------------- interruptions, other settings


def test_a_run_that_was_stopped_goes_on(noisy: Path, tmp_path: Path) -> None:
    whole = train(settings(noisy, tmp_path, name="whole", epochs=3))
    config, events = settings(noisy, tmp_path, epochs=3), []
    for event in run_plan(
        prepare(config), stop=lambda: sum(isinstance(e, StepDone) for e in events) == 2
    ):
        events.append(event)
    run = Run.open(tmp_path / "run")
    assert run.comparison() is None
    list(run_plan(prepare(run.config(), run), run))
    assert run.comparison() == whole.comparison()
    one, other = (Run.open(r.path / "candidates" / "last-stages") for r in (run, whole))
    assert one.history()[-1].val_loss == other.history()[-1].val_loss


@pytest.mark.parametrize(
    ("more", "mode"),
    [
        ({}, "feature-extractor"),
        ({"class_weights": "balanced", "folds": 3}, "feature-extractor"),
        ({"feature_views": 1}, "feature-extractor"),
        ({"head_solver": "sgd"}, "feature-extractor"),
        ({"lr": 0.1}, "finetune"),
        ({"train_stages": 1}, "finetune"),
        ({"mixup": 0.2}, "finetune"),
        ({"layer_decay": 0.5}, "finetune"),
        ({"pretrained": False}, "finetune"),
    ],
)
def test_settings_that_say_what_trains_win(
    flat: Path, tmp_path: Path, more: dict[str, object], mode: str
) -> None:
    plan = prepare(settings(flat, tmp_path, **more))
    assert plan.config.freezing.mode == mode
    assert plan.compares == (not more or "folds" in more)


def test_a_head_that_cannot_be_solved_means_that_all_layers_train(flat: Path) -> None:
    config = Config.of(
        flat, backbone="torchvision/squeezenet1_1", pretrained=False, image_size=64, workers=0,
        device="cpu", mode="feature-extractor",
    )  # fmt: skip
    assert prepare(config).config.freezing.head_solver == "sgd"


@pytest.mark.parametrize("more", [{"head_solver": "lbfgs"}, {"features": "stages"}])
def test_what_is_asked_of_the_head_is_not_of_the_other_network(
    noisy: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    run = train(settings(noisy, tmp_path, ensemble=True, **more))
    assert run.comparison() is not None


@pytest.mark.parametrize("more", [{"mode": "finetune"}, {"lr": 0.1}])
def test_an_ensemble_needs_both(flat: Path, tmp_path: Path, more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--ensemble"):
        prepare(settings(flat, tmp_path, ensemble=True, **more))
