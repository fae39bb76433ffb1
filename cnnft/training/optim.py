"""The learning-rate rule, parameter groups, optimizers by name."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from cnnft.config.optimization import OptimizerConfig
from cnnft.errors import UsageError, did_you_mean

REFERENCE_BATCH = 256
"""Original learning rates are stated per this many images (Goyal et al., 2017)."""

_ORIGINAL_LR = 0.1
_ORIGINAL_LR_PLAIN = 0.01
_PLAIN = ("alexnet", "vgg", "squeezenet")  # networks that train from scratch at a lower rate

_UNNORMALISED = 10
"""What pretrained layers' rate is divided by where BatchNorm statistics are frozen: nothing is
normalised then, and networks without normalisation train at a tenth (as the two rates above say).
"""

_NORMALISED_LR = 0.001
"""Of optimizers that divide by the size of the gradients, so that a step is about as long as the
rate (Kingma and Ba, 2015; Hinton's RMSprop). The batch changes the gradients' noise, not the length
of such a step: nothing is scaled linearly."""
_OWN_LR = {
    "Adagrad": 0.01,  # its steps begin as long as Adam's and shrink with the root of their number
    "Adadelta": 1.0,  # its steps have the weights' own unit (Zeiler, 2012)
    "Lion": 0.0001,  # every weight moves by the whole rate (Chen et al., 2023)
    "Lars": 1.0,  # times its trust coefficient of 0.001
    "Muon": 0.02,
    "MADGRAD": 0.01,
    "RMSpropTF": 0.0001,  # its momentum makes steps ten times as long as the rate
}
"""By class: the rates they were published with, or that timm defaults to."""

_OWN_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("momentum", {}),  # timm's "sgd" is Nesterov's
    "plain-sgd": ("momentum", {"momentum": 0.0}),
    # As Hinton taught it; with timm's momentum of 0.9 a rate means ten times as much.
    "rmsprop": ("rmsprop", {"momentum": 0.0}),
}
"""Name -> timm's name, and what is set otherwise than timm does."""


@dataclass(frozen=True)
class LearningRates:
    """Rates at the start of the schedule, and how they came about."""

    backbone: float
    head: float
    derivation: str


@dataclass(frozen=True)
class Start:
    """What training starts from, as far as learning rates depend on it."""

    backbone: Literal["frozen", "pretrained", "random"]
    head_is_fitted: bool = False
    """By a linear probe: it has something to protect, as pretrained layers have."""
    statistics_are_frozen: bool = False
    """Of BatchNorm layers that train."""


def learning_rates(
    config: OptimizerConfig, architecture: str, batch: int, start: Start
) -> LearningRates:
    """The 1/10 rule: pretrained layers train at a tenth of the rate of training from scratch.

    scratch = original × batch / 256 (linear scaling, Goyal et al., 2017) for SGD and its
    relatives, where `batch` is the images that a step really holds; the optimizer's usual rate for
    others. Pretrained layers train at scratch / 10 (with SGD and frozen BatchNorm statistics at a
    tenth of that), a new head at scratch, a fitted one at
    scratch / 10 too; without pretraining everything at scratch. `config.lr` and `config.head_lr`
    override the outcome.
    """
    if _is_sgd(config):
        original = _ORIGINAL_LR_PLAIN if architecture.startswith(_PLAIN) else _ORIGINAL_LR
        scratch = original * batch / REFERENCE_BATCH
        steps = [
            f"from scratch: {original:g} (original, per {REFERENCE_BATCH} images) "
            f"× {batch} / {REFERENCE_BATCH} = {scratch:g}"
        ]
    else:
        scratch = _OWN_LR.get(_info(config.optimizer).opt_class.__name__, _NORMALISED_LR)
        steps = [f"from scratch: {scratch:g} (usual for {config.optimizer}, whatever the batch)"]
    head, words = _head_rate(config, scratch, start)
    steps.append(f"head: {words}")
    backbone, words = _backbone_rate(config, scratch, start)
    steps.append(f"backbone: {words}")
    if config.layer_decay is not None and backbone:
        steps.append(f"each stage before the last: × {config.layer_decay:g} (--layer-decay)")
    return LearningRates(backbone, head, "; ".join(steps))


def _head_rate(config: OptimizerConfig, scratch: float, start: Start) -> tuple[float, str]:
    if config.head_lr is not None:
        return config.head_lr, f"{config.head_lr:g} (--head-lr)"
    if start.head_is_fitted:
        return scratch / 10, f"{scratch:g} / 10 = {scratch / 10:g} (probed)"
    return scratch, f"{scratch:g} (new)"


def _backbone_rate(config: OptimizerConfig, scratch: float, start: Start) -> tuple[float, str]:
    if start.backbone == "frozen":
        return 0.0, "frozen"
    if config.lr is not None:
        return config.lr, f"{config.lr:g} (--lr)"
    if start.backbone == "pretrained" and start.statistics_are_frozen and _is_sgd(config):
        rate = scratch / 10 / _UNNORMALISED
        words = f"(pretrained) / {_UNNORMALISED} (BatchNorm statistics frozen)"
        return rate, f"{scratch:g} / 10 {words} = {rate:g}"
    if start.backbone == "pretrained":
        return scratch / 10, f"{scratch:g} / 10 = {scratch / 10:g} (pretrained)"
    return scratch, f"{scratch:g} (not pretrained)"


def make_optimizer(
    network: nn.Module,
    head: frozenset[str],
    stages: Sequence[Sequence[str]],
    rates: LearningRates,
    config: OptimizerConfig,
) -> torch.optim.Optimizer:
    """`config.optimizer` for the parameters that train: a group for the head, one for the backbone.

    With `config.layer_decay` each stage is a group of its own, and the rates fall towards the
    input (Howard and Ruder, 2018). With `config.weight_decay` the parameters that do not decay are
    groups of their own. Every parameter is frozen or in exactly one group; this is asserted.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if config.layer_decay is None:
        stages = [[name for stage in stages for name in stage]]
    decay = config.layer_decay or 1.0
    groups = [
        {
            "name": "backbone",
            "params": [trained[name] for name in stage if name in trained],
            "lr": rates.backbone * decay**distance,
        }
        for distance, stage in enumerate(reversed(stages))
    ]
    head_parameters = [p for name, p in trained.items() if name in head]
    groups.append({"name": "head", "params": head_parameters, "lr": rates.head})
    if config.weight_decay and not config.decay_all:
        groups = [part for group in groups for part in _decaying_and_not(group)]
    groups = [group for group in groups if group["params"]]
    name, options = _OWN_NAMES.get(config.optimizer, (config.optimizer, {}))
    optimizer = create_optimizer_v2(
        groups,
        name,
        lr=rates.head,  # some want one; each group has its own
        weight_decay=config.weight_decay,
        **{"momentum": config.momentum} | options,
    )
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    frozen = [id(p) for p in network.parameters() if not p.requires_grad]
    assert sorted(grouped + frozen) == sorted(id(p) for p in network.parameters())
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        if "buffer" in group:  # timm before 1.0.31: step sizes of radamlegacy, shared by all groups
            group["buffer"] = copy.deepcopy(group["buffer"])
    return optimizer


def _decaying_and_not(group: dict[str, Any]) -> list[dict[str, Any]]:
    """No weight decay for scales, shifts and biases, which have one dimension."""
    decaying = [p for p in group["params"] if p.ndim > 1]
    others = [p for p in group["params"] if p.ndim <= 1]
    return [group | {"params": decaying}, group | {"params": others, "weight_decay": 0.0}]


def require_optimizer(config: OptimizerConfig) -> None:
    """Raises `UsageError` where there is none of that name, or it needs another training step."""
    name = config.optimizer
    if reason := _unfit(name):
        raise UsageError(f"--optimizer {name} {reason}: take another one, such as sgd or adamw")
    if name not in optimizers():
        raise UsageError(f"unknown --optimizer {name!r:.100}{did_you_mean(name, optimizers())}")
    info = _info(name)
    if info.has_momentum and (info.defaults or {}).get("nesterov") and not config.momentum:
        raise UsageError(f"--optimizer {name} is about momentum, which is 0: take plain-sgd")


def optimizers() -> list[str]:
    """Every name that `config.optimizer` can have: timm's of first order, and some of our own."""
    return sorted({*_OWN_NAMES, *(name for name in list_optimizers() if not _unfit(name))})


def _unfit(name: str) -> str | None:
    """Why torch or timm has the optimizer and cnnft does not; None of other names."""
    if name == "lbfgs":
        return "computes the loss several times in a step"
    if name not in list_optimizers():
        return None
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        return f"is of the package {info.opt_class.partition('.')[0]}, which cnnft does not use"
    if info.second_order:
        return "needs second derivatives"
    if info.opt_class.__name__ == "Kron":
        return "draws random numbers of its own, so that an interrupted run would end differently"
    return None


def _is_sgd(config: OptimizerConfig) -> bool:
    """Whether the length of a step is that of the gradients."""
    return str(_info(config.optimizer).opt_class.__name__).startswith("SGD")


def _info(name: str) -> Any:
    return get_optimizer_info(_OWN_NAMES.get(name, (name, {}))[0])
