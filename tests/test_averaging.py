"""Averages of weights, statistics that belong to them, and ensembles."""

import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from cnnft import finetune, load
from cnnft.config.optimization import OptimizerConfig, ScheduleConfig
from cnnft.config.schema import Config
from cnnft.inference.predict import Ensemble
from cnnft.models.weights import backbone_hash
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.training import session
from cnnft.training.averaging import equal_average, recalibrate, running_average
from cnnft.training.constraints import gradient_rules, weight_rules
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.schedules import Length, make_schedule


class Weight(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values]))


def take(network: Weight, average, values):
    for value in values:
        with torch.no_grad():
            network.weight.fill_(value)
        average.update_parameters(network)
    return float(average.module.weight.detach())


def test_the_running_average_has_its_formula():
    network = Weight(0.0)
    expected, values = 3.0, [3.0, -1.0, 2.0, 5.0, 4.0]
    for n, value in enumerate(values[1:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert take(network, running_average(network, 0.3), values) == pytest.approx(expected)


def test_the_equal_average_is_the_mean():
    network = Weight(0.0)
    assert take(network, equal_average(network), [3.0, -1.0, 4.0]) == pytest.approx(2.0)


def test_recalibration_is_a_full_pass():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pixels = torch.randn(12, 3, 8, 8) * 3 + 1
    recalibrate(network, [network[0], network[2]], [pixels])
    mean, var = network[0].running_mean, network[0].running_var
    torch.testing.assert_close(mean, pixels.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(var, pixels.var(dim=(0, 2, 3)))
    assert network[0].momentum == 0.1 and not network.training


def test_recalibration_with_equal_batches_is_torchs_and_spares_other_layers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pixels = torch.randn(12, 3, 8, 8) * 3 + 1
    recalibrate(network, [network[0], network[2]], pixels.split(4))
    found = {k: v.clone() for k, v in network.state_dict().items()}
    update_bn(pixels.split(4), network)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value)
    network[2].running_mean.fill_(7.0)
    recalibrate(network, [network[0]], pixels.split(5))
    assert (network[2].running_mean == 7).all()
    # 5 + 5 + 2 images: each counts by its images
    torch.testing.assert_close(network[0].running_mean, pixels.mean(dim=(0, 2, 3)))


def test_a_vote_is_the_log_of_the_mean_probability():
    torch.manual_seed(0)
    networks, pixels = [nn.Linear(4, 3), nn.Linear(4, 3)], torch.randn(5, 4)
    expected = torch.stack([n(pixels).softmax(dim=1) for n in networks]).mean(dim=0)
    torch.testing.assert_close(Ensemble(networks)(pixels).exp(), expected)


def test_l1_adds_its_gradient_to_what_decays_before_clipping():
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[2.0, -3.0]]))
    network.weight.grad, network.bias.grad = torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
    gradient_rules(network, OptimizerConfig(l1=0.5))()
    assert network.weight.grad.tolist() == [[1.5, 0.5]] and network.bias.grad.tolist() == [2.0]
    gradient_rules(network, OptimizerConfig(clip_grad=0.5))()
    total = torch.cat([network.weight.grad.flatten(), network.bias.grad]).norm()
    assert float(total) == pytest.approx(0.5)


def test_l1_alone_brings_a_weight_to_zero_and_max_norm_shortens_long_rows_only():
    network = Weight(0.3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    rule = gradient_rules(network, OptimizerConfig(l1=0.5))
    for _ in range(6):  # 0.3 / (0.1 · 0.5) = 6 steps
        network.weight.grad = torch.zeros(1, 1)
        rule()
        optimizer.step()
    assert float(network.weight) == pytest.approx(0, abs=1e-6)
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    weight_rules(head, frozenset({"weight", "bias"}), OptimizerConfig(max_norm=2.0))()
    torch.testing.assert_close(head.weight, torch.tensor([[1.2, 1.6], [0.3, 0.4]]))


def test_the_rate_stays_where_it_is_when_averaging_begins():
    plain = make_schedule(ScheduleConfig(), Length(10, 4))
    held = make_schedule(ScheduleConfig(), Length(10, 4, swa=3))
    assert [held(step) for step in range(28)] == [plain(step) for step in range(28)]
    assert {held(step) for step in range(28, 40)} == {plain(28)}


SMALL = {"backbone": "builtin", "image_size": 32, "workers": 0, "batch_size": 6}


def test_an_average_leaves_what_is_frozen_as_it_is(cnnft, separated, tmp_path):
    """Counters of BatchNorm layers drifted by one, so that the head could not be exported alone."""
    run = finetune(
        separated, mode="feature-extractor", ema=0.9, epochs=2, runs_dir=tmp_path, **SMALL
    )
    classifier = load(run.path)
    assert backbone_hash(classifier.network, classifier.head) == classifier.pretrained_hash
    assert cnnft("export", run.path, "--format", "head").code == 0


def test_counters_are_copied_into_an_average():
    network = nn.BatchNorm1d(2)
    average = running_average(network, 0.5)
    for count in (1000, 1001):
        network.num_batches_tracked.fill_(count)
        average.update_parameters(network)
    assert int(average.module.num_batches_tracked) == 1001


def test_snapshots_vote_in_predict_and_evaluate(cnnft, separated, tmp_path):
    run = finetune(
        separated, epochs=4, schedule="cosine-restarts", snapshots=2, runs_dir=tmp_path, **SMALL
    )
    classifier = load(run.path)
    classifier.temperature = 1.0
    files = sorted((separated / "val").glob("*/*.png"))
    votes = []
    for number in (1, 2):
        single = load(run.path).network.networks[number - 1]
        classifier.network, kept = single, classifier.network
        votes.append([dict(p.top) for p in classifier.predict(files)])
        classifier.network = kept
    assert votes[0] != votes[1]
    for vote, *single in zip(classifier.predict(files), *votes, strict=True):
        for name, probability in vote.top:
            mean = sum(one[name] for one in single) / 2
            assert probability == pytest.approx(mean, abs=1e-6)
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["model"] == "the snapshot ensemble of 2"
    assert metrics["val"]["note"] == "not selected on val"
    outcome = cnnft("evaluate", separated, "-m", run.path, "--json")
    assert json.loads(outcome.out)["correct"] == metrics["val"]["correct"]
    cnnft("export", run.path, "--format", "head").fails_with(2, "an ensemble of 2 networks", "onnx")


def test_snapshots_are_taken_where_the_cosines_end_also_after_a_warm_up(
    cnnft, separated, tmp_path, monkeypatch
):
    taken = []
    monkeypatch.setattr(Run, "save_snapshot", lambda run, number, _: taken.append(number))
    monkeypatch.setattr(session, "snapshot_ensemble", lambda classifier, _: classifier.network)
    config = Config.of(
        separated, epochs=5, warmup_epochs=1, schedule="cosine-restarts", snapshots=2,
        runs_dir=tmp_path, name="s", **SMALL,
    )  # fmt: skip
    epochs = []
    for event in run_plan(prepare(config)):
        if isinstance(event, Epoch):
            epochs.append((event.epoch, list(taken)))
    assert epochs == [(1, []), (2, []), (3, [1]), (4, [1]), (5, [1, 2])]
    monkeypatch.undo()
    refused = cnnft("finetune", "--resume", tmp_path / "s", "--epochs", 9)
    refused.fails_with(2, "--epochs", "start a new run")


@pytest.mark.parametrize("settings", [{"swa": 2}, {"ema": 0.9}])
def test_an_average_is_kept_only_if_val_is_not_worse(separated, tmp_path, settings):
    run = finetune(separated, epochs=3, runs_dir=tmp_path, batchnorm="train", **settings, **SMALL)
    metrics = run.metrics()
    assert metrics.val.accuracy >= max(epoch.val_accuracy for epoch in run.history())
    predictions = run.predictions()
    assert predictions.score().correct == metrics.val.correct
    again = [p.label for p in load(run.path, device="cpu").predict(predictions.samples.paths)]
    classes = predictions.samples.classes
    assert again == [classes[label] for label in predictions.predicted]


def test_patience_ends_training_and_a_resumed_run_stays_ended(cnnft, separated, tmp_path):
    flags = ("--backbone", "builtin", "--image-size", 32, "--workers", 0, "--lr", 1e-9)
    flags += ("--head-lr", 1e-9, "--runs-dir", tmp_path, "--name", "p", "--no-probe-first")
    assert cnnft("finetune", separated, *flags, "--epochs", 9, "--patience", 2).code == 0
    history = (tmp_path / "p" / "history.csv").read_text()
    best = max(i for i, row in enumerate(history.splitlines()) if row.endswith("True"))
    assert len(history.splitlines()) - 1 == best + 2 < 9
    assert cnnft("finetune", "--resume", tmp_path / "p").code == 0
    assert (tmp_path / "p" / "history.csv").read_text() == history
    assert cnnft("finetune", "--resume", tmp_path / "p", "--patience", 3).code == 0
    assert len((tmp_path / "p" / "history.csv").read_text().splitlines()) - 1 == best + 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--snapshots", 2), ("--schedule cosine", "cosine-restarts")),
        (("--snapshots", 4, "--schedule", "cosine-restarts", "--epochs", 10), ("take 12",)),
        (("--snapshots", 2, "--ema", 0.9), ("--ema and --snapshots", "choose one")),
        (("--swa", 5, "--epochs", 5), ("--swa 5", "below --epochs 5")),
        (("--swa", 2, "--patience", 1), ("--patience", "leave one out")),
        (("--ema", 1), ("--ema 1", "below 1")),
        (("--temperature", 2), ("--teacher",)),
        (("--class-weights", "balanced", "--sampling", "balanced"), ("leave one out",)),
        (("--drop-path", 0.1, "--mode", "feature-extractor"), ("--drop-path",)),
    ],
)
def test_what_makes_no_sense_is_refused(cnnft, flat, tmp_path, flags, words):
    shared = ("--backbone", "builtin", "--image-size", 32, "--workers", 0, "--runs-dir", tmp_path)
    cnnft("finetune", flat, *shared, *flags).fails_with(2, *words)
    assert not any(tmp_path.glob("*/config.toml"))
