"""The learning-rate rule, parameter groups, optimizers by name."""

import copy
from functools import partial
from typing import get_args

import pytest
import torch
from torch.nn.functional import cross_entropy

from cnnft.config.choices import Schedule
from cnnft.config.optimization import OptimizerConfig, ScheduleConfig
from cnnft.data.sampler import KeyedBatches
from cnnft.models.freezing import freeze, train_mode
from cnnft.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from cnnft.training.optim import Start, learning_rates, make_optimizer, optimizers
from cnnft.training.schedules import Length, make_schedule
from cnnft.training.state import TrainState
from cnnft.training.step import train

NEW = Start("pretrained")


def rates(
    architecture: str = "resnet18", batch: int = 32, start: Start = NEW, **settings: object
) -> tuple[float, float, str]:
    found = learning_rates(OptimizerConfig(**settings), architecture, batch, start)
    return found.backbone, found.head, found.derivation


def test_the_tutorials_rate_is_the_rule_at_batch_32():
    backbone, head, derivation = rates(batch=32)
    assert (backbone, head) == pytest.approx((0.00125, 0.0125))
    assert "0.1 (original, per 256 images) × 32 / 256 = 0.0125" in derivation
    assert "0.0125 / 10 = 0.00125" in derivation


@pytest.mark.parametrize(
    ("architecture", "original"),
    [("resnet50", 0.1), ("vgg16", 0.01), ("alexnet", 0.01), ("squeezenet1_0", 0.01)],
)
def test_pretrained_layers_train_at_a_tenth_of_scratch(architecture, original):
    backbone, head, _ = rates(architecture, batch=256)
    assert (backbone, head) == pytest.approx((original / 10, original))


def test_without_pretraining_everything_trains_at_the_scratch_rate():
    backbone, head, _ = rates(batch=64, start=Start("random"))
    assert backbone == head == pytest.approx(0.025)


def test_a_fitted_head_has_something_to_protect():
    assert rates(start=Start("pretrained", head_is_fitted=True))[1] == pytest.approx(0.00125)


def test_a_frozen_backbone_has_no_rate():
    backbone, _, derivation = rates(start=Start("frozen"))
    assert backbone == 0 and "backbone: frozen" in derivation


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


def optimizer_of(network: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    rates = learning_rates(config, "resnet18", 32, NEW)
    return make_optimizer(network, HEAD, STAGES, rates, config)


@pytest.mark.parametrize(("mode", "groups"), [("finetune", [4, 2]), ("feature-extractor", [2])])
def test_every_parameter_is_frozen_or_in_exactly_one_group(network, mode, groups):
    freeze(network, HEAD, STAGES, mode)
    optimizer = optimizer_of(network, OptimizerConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {id(p) for p in network.parameters() if not p.requires_grad}
    assert in_groups | frozen == {id(p) for p in network.parameters()}
    assert not in_groups & frozen
    assert optimizer.param_groups[-1]["lr"] == 0.0125


def test_with_frozen_statistics_sgd_trains_pretrained_layers_at_a_tenth():
    start = Start("pretrained", head_is_fitted=True, statistics_are_frozen=True)
    backbone, head, derivation = rates(start=start)
    assert (backbone, head) == pytest.approx((0.000125, 0.00125))
    assert "0.0125 / 10 (pretrained) / 10 (BatchNorm statistics frozen) = 0.000125" in derivation
    assert rates(optimizer="adamw", start=start)[0] == pytest.approx(0.0001)


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


# ---------------------------------------------------------------- weight decay


@pytest.mark.parametrize("decay_all", [False, True])
def test_norms_and_biases_decay_only_when_asked(network, decay_all):
    freeze(network, HEAD, STAGES, "finetune")
    optimizer = optimizer_of(network, OptimizerConfig(weight_decay=0.1, decay_all=decay_all))
    names = {id(p): name for name, p in network.named_parameters()}
    decaying = {
        names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    assert decaying == (set(names.values()) if decay_all else {"0.weight", "4.weight"})
    assert {(g["name"], g["lr"]) for g in optimizer.param_groups} == {
        ("backbone", 0.00125), ("head", 0.0125),
    }  # fmt: skip


# ---------------------------------------------------------------- optimizers by name

NAMED = (
    "sgd", "plain-sgd", "nesterov", "rmsprop", "adagrad", "adadelta", "adam", "adamw", "adamax",
    "nadam",
)  # fmt: skip
ORACLES = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "plain-sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, alpha=0.9),  # Hinton's lecture
    "adagrad": partial(torch.optim.Adagrad, eps=1e-8),
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
}


def steps(network: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> torch.Tensor:
    """All weights after `count` plain steps."""
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        network(torch.randn(6, 3, 1, 1)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", NAMED)
def test_a_name_means_torchs_optimizer_of_that_name(network, name):
    settings = {"lr": 0.01, "head_lr": 0.01, "weight_decay": 0.1, "decay_all": True}
    other = copy.deepcopy(network)
    ours = optimizer_of(network, OptimizerConfig(optimizer=name, **settings))
    theirs = ORACLES[name](other.parameters(), lr=0.01, weight_decay=0.1)
    assert type(ours) is type(theirs)
    assert torch.allclose(steps(network, ours, 4), steps(other, theirs, 4), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "head"),
    [("adam", 0.001), ("adamw", 0.001), ("rmsprop", 0.001), ("adagrad", 0.01), ("adadelta", 1),
     ("lion", 0.0001), ("sgdw", 0.05), ("nesterov", 0.05)],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["resnet18", "vgg16"])
def test_only_what_is_made_from_sgd_scales_with_the_batch_and_knows_plain_networks(
    optimizer, head, architecture
):
    if architecture == "vgg16" and optimizer in ("sgdw", "nesterov"):
        head /= 10
    backbone, found, derivation = rates(architecture, 128, optimizer=optimizer)
    assert (backbone, found) == pytest.approx((head / 10, head))
    assert (
        f"from scratch: {head:g} (usual for {optimizer}" in derivation
        or "× 128 / 256" in derivation
    )
    assert f"head: {head:g} (new)" in derivation and f"/ 10 = {head / 10:g}" in derivation


def trained(
    network: torch.nn.Module, epochs: int, schedule: ScheduleConfig, **settings: object
) -> TrainState:
    optimizer = optimizer_of(network, OptimizerConfig(weight_decay=0.01, **settings))
    multiplier = make_schedule(schedule, Length(epochs, 2))
    return TrainState(network, optimizer, multiplier, KeyedBatches(12, 6, 0, epochs))


def take(state: TrainState, first: int, last: int) -> torch.Tensor:
    """All weights and running statistics after cnnft's own steps from `first` to `last`."""
    torch.manual_seed(first)
    batches = [(torch.randn(6, 3, 4, 4), torch.arange(6) % 2) for _ in range(first, last)]
    list(train(state, batches, partial(cross_entropy, reduction="sum")))
    return torch.cat([t.double().flatten() for t in state.network.state_dict().values()])


@pytest.fixture
def pooled() -> torch.nn.Sequential:
    """`network` for images larger than a pixel."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip


@pytest.mark.parametrize("name", optimizers())
def test_the_state_of_every_optimizer_survives_a_checkpoint(pooled, tmp_path, name):
    """Through the file, into a new optimizer; the resumed steps are those of an unbroken run."""
    other = copy.deepcopy(pooled)
    state = trained(pooled, 3, ScheduleConfig(), optimizer=name)
    take(state, 0, 3)
    tensors, values = state.state_dict()
    save_checkpoint(tmp_path, Checkpoint(3, tensors, {"state": values}))
    expected = take(state, 3, 6)

    saved, resumed = load_checkpoint(tmp_path), trained(other, 3, ScheduleConfig(), optimizer=name)
    resumed.restore(saved.tensors, saved.values["state"])
    assert torch.equal(take(resumed, 3, 6), expected)
    again = resumed.state_dict()[0]
    assert again.keys() == state.state_dict()[0].keys()
    assert all(torch.equal(again[n], tensor) for n, tensor in state.state_dict()[0].items())


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_optimizer_takes_steps_under_every_schedule(pooled, schedule):
    start = copy.deepcopy(pooled.state_dict())
    for name in NAMED:
        pooled.load_state_dict(start)
        before = pooled[4].weight.clone()
        weights = take(trained(pooled, 4, ScheduleConfig(schedule), optimizer=name), 0, 2)
        assert weights.isfinite().all(), name
        assert not torch.equal(pooled[4].weight, before), name
