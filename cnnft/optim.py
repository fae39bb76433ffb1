"""The learning-rate rule, parameter groups, and the schedule as a function of the step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cnnft import distributed
from cnnft.config import Config

REFERENCE_BATCH = 256
"""Original learning rates are stated per this many images (Goyal et al., 2017)."""

_ORIGINAL_LR = 0.1
_ORIGINAL_LR_PLAIN = 0.01
_PLAIN = ("alexnet", "vgg", "squeezenet")  # networks that train from scratch at a lower rate


@dataclass(frozen=True)
class LearningRates:
    """Rates at the start of the schedule, and how they came about."""

    backbone: float
    head: float
    derivation: str


def learning_rates(config: Config, architecture: str, probed: bool = False) -> LearningRates:
    """The 1/10 rule: pretrained layers train at a tenth of the rate of training from scratch.

    scratch = original × batch / 256 (linear scaling, Goyal et al., 2017); pretrained layers at
    scratch / 10, a new head at scratch, and at scratch / 10 too if it was `probed`; without
    pretraining everything at scratch. `config.lr` and `config.head_lr` override the outcome.
    """
    original = _ORIGINAL_LR_PLAIN if architecture.startswith(_PLAIN) else _ORIGINAL_LR
    scratch = original * config.images_per_step / REFERENCE_BATCH
    steps = [
        f"from scratch: {original:g} (original, per {REFERENCE_BATCH} images) "
        f"× {config.images_per_step} / {REFERENCE_BATCH} = {scratch:g}"
    ]
    head, backbone = scratch, scratch
    if config.head_lr is not None:
        head = config.head_lr
        steps.append(f"head: {head:g} (--head-lr)")
    elif probed:
        head = scratch / 10
        steps.append(f"head: {scratch:g} / 10 = {head:g} (probed)")
    else:
        steps.append(f"head: {head:g} (new)")
    if config.mode == "feature-extractor":
        backbone = 0.0
        steps.append("backbone: frozen")
    elif config.lr is not None:
        backbone = config.lr
        steps.append(f"backbone: {backbone:g} (--lr)")
    elif config.pretrained:
        backbone = scratch / 10
        steps.append(f"backbone: {scratch:g} / 10 = {backbone:g} (pretrained)")
    else:
        steps.append(f"backbone: {backbone:g} (not pretrained)")
    if config.layer_decay is not None and backbone:
        steps.append(f"each stage before the last: × {config.layer_decay:g} (--layer-decay)")
    return LearningRates(backbone, head, "; ".join(steps))


def make_optimizer(
    network: nn.Module,
    head: frozenset[str],
    stages: Sequence[Sequence[str]],
    rates: LearningRates,
    config: Config,
) -> torch.optim.SGD:
    """SGD over the parameters that train: a group for the head, and one for the backbone.

    With `config.layer_decay` each stage is a group of its own, and the rates fall towards the
    input (Howard and Ruder, 2018). Every parameter is frozen or in exactly one group; this is
    asserted.
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
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    frozen = [id(p) for p in network.parameters() if not p.requires_grad]
    assert sorted(grouped + frozen) == sorted(id(p) for p in network.parameters())
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


Multiplier = Callable[[int], float]
"""Step -> what the initial learning rates are multiplied by."""


def make_schedule(config: Config, steps_per_epoch: int) -> Multiplier:
    total = config.epochs * steps_per_epoch
    if config.schedule == "step":
        every = config.step_epochs * steps_per_epoch
        return lambda step: config.step_gamma ** (step // every)
    return lambda step: cosine(step, total)


def cosine(step: int, total: int) -> float:
    """Half a period, from 1 towards 0 (Loshchilov and Hutter, 2017, without restarts)."""
    return (1 + math.cos(math.pi * step / total)) / 2


SMALL_BATCH = 8
"""Below this the statistics of a batch are too noisy for BatchNorm (Wu and He, 2018)."""


def freezes_statistics(config: Config) -> bool:
    """Whether BatchNorm layers that train keep their pretrained statistics."""
    if config.batchnorm == "auto":
        seen = config.images_at_once * (distributed.world if config.sync_bn else 1)
        return config.pretrained and seen < SMALL_BATCH
    return config.batchnorm == "frozen"
