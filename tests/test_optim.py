"""The learning-rate rule, parameter groups and schedules."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from cnnft.config import Config
from cnnft.freezing import freeze, train_mode
from cnnft.optim import learning_rates, make_optimizer
from cnnft.schedules import make_schedule


def rates(architecture: str = "resnet18", **settings: object) -> tuple[float, float, str]:
    found = learning_rates(Config("-", **settings), architecture)
    return found.backbone, found.head, found.derivation


def test_the_tutorials_rate_is_the_rule_at_batch_32():
    backbone, head, derivation = rates(batch_size=32)
    assert (backbone, head) == pytest.approx((0.00125, 0.0125))
    assert "0.1 (original, per 256 images) × 32 / 256 = 0.0125" in derivation
    assert "0.0125 / 10 = 0.00125" in derivation


@pytest.mark.parametrize(
    ("architecture", "original"),
    [("resnet50", 0.1), ("vgg16", 0.01), ("alexnet", 0.01), ("squeezenet1_0", 0.01)],
)
def test_pretrained_layers_train_at_a_tenth_of_scratch(architecture, original):
    backbone, head, _ = rates(architecture, batch_size=256)
    assert (backbone, head) == pytest.approx((original / 10, original))


def test_without_pretraining_everything_trains_at_the_scratch_rate():
    backbone, head, _ = rates(pretrained=False, batch_size=64)
    assert backbone == head == pytest.approx(0.025)


def test_rates_can_be_set_outright():
    backbone, head, derivation = rates(lr=0.3, head_lr=0.7)
    assert (backbone, head) == (0.3, 0.7)
    assert "--lr" in derivation and "--head-lr" in derivation


@pytest.fixture
def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(),
        torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip


HEAD = frozenset({"4.weight", "4.bias"})
STAGES = (("0.weight", "0.bias"), ("1.weight", "1.bias"))


@pytest.mark.parametrize(("mode", "groups"), [("finetune", [4, 2]), ("feature-extractor", [2])])
def test_every_parameter_is_frozen_or_in_exactly_one_group(network, mode, groups):
    freeze(network, HEAD, STAGES, mode)
    config = Config("-")
    optimizer = make_optimizer(network, HEAD, STAGES, learning_rates(config, "resnet18"), config)
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {id(p) for p in network.parameters() if not p.requires_grad}
    assert in_groups | frozen == {id(p) for p in network.parameters()}
    assert not in_groups & frozen
    assert optimizer.param_groups[-1]["lr"] == 0.0125


def test_frozen_batchnorm_stays_in_eval_mode(network):
    freeze(network, HEAD, STAGES, "feature-extractor")
    train_mode(network)
    assert not network[1].training and network[4].training
    freeze(network, HEAD, STAGES, "finetune")
    train_mode(network)
    assert all(module.training for module in network.modules())


def test_dropout_is_off_among_frozen_layers_and_on_before_the_head():
    """As in AlexNet, whose first dropout comes before a frozen linear layer."""
    dropouts = [torch.nn.Dropout(), torch.nn.Dropout()]
    plain = torch.nn.BatchNorm1d(4, affine=False)
    network = torch.nn.Sequential(
        plain, dropouts[0], torch.nn.Linear(4, 4), dropouts[1], torch.nn.Linear(4, 2)
    )
    freeze(
        network, frozenset({"4.weight", "4.bias"}), (("2.weight", "2.bias"),), "feature-extractor"
    )
    train_mode(network)
    assert [module.training for module in network] == [False, False, False, True, True]
    assert not network.training


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_schedules_equal_torchs(name):
    """torch steps its cosine by epoch and ours by step: compare with one step an epoch."""
    config = Config("-", epochs=30, schedule=name)
    ours = make_schedule(config, steps_per_epoch=1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = StepLR(optimizer, 7, 0.1) if name == "step" else CosineAnnealingLR(optimizer, 30)
    for step in range(30):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_step_schedule_counts_epochs():
    ours = make_schedule(Config("-", schedule="step", step_epochs=2), steps_per_epoch=3)
    assert [round(ours(step), 9) for step in (0, 5, 6, 11, 12)] == [1, 1, 0.1, 0.1, 0.01]
