"""How the learning rates go while training: pure functions of the step and of the losses on val."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from cnnft.config import Config

_PERIODS = 3  # of cosine-restarts, where their length is not given
_PLATEAU_THRESHOLD = 1e-4  # falling by a smaller share is standing still; as torch has it
# Of the highest rate, what one-cycle begins and ends at; as torch has them.
_CYCLE_BEGINS = 1 / 25
_CYCLE_ENDS = _CYCLE_BEGINS / 1e4


class Multiplier(Protocol):
    """(step from 0, losses on val so far) -> what the initial learning rates are multiplied by.

    Only plateau looks at the losses, and only at those of epochs before the step's.
    """

    def __call__(self, step: int, val_losses: Sequence[float] = ()) -> float: ...


def make_schedule(config: Config, steps_per_epoch: int) -> Multiplier:
    """`config.schedule`, after a linear warm-up (Goyal et al., 2017).

    The schedule begins, at the full rate, where the warm-up ends, and has the rest of the training
    to run in. Milestones alone are counted from the start of the training. Where the last epochs
    are averaged (`config.swa`), the rate stays what it is when they begin (Izmailov et al., 2018).
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    shape = _shape(config, steps_per_epoch, warmup, total - warmup)
    warm_epochs = math.ceil(warmup / steps_per_epoch)

    averaging = total - (config.swa or 0) * steps_per_epoch

    def multiplier(step: int, val_losses: Sequence[float] = ()) -> float:
        step = min(step, averaging)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "plateau":
            seen = val_losses[warm_epochs : step // steps_per_epoch]
            return plateau(seen, config.step_gamma, config.plateau_patience)
        return shape(step - warmup)

    return multiplier


def _shape(config: Config, steps_per_epoch: int, warmup: int, steps: int) -> Callable[[int], float]:
    """Step since the warm-up -> multiplier, of schedules that depend on nothing else."""
    gamma, every = config.step_gamma, config.step_epochs * steps_per_epoch
    slow = config.inverse_epochs * steps_per_epoch
    if config.schedule == "step":
        return lambda step: gamma ** (step // every)
    if config.schedule == "multistep":
        at = [epoch * steps_per_epoch - warmup for epoch in config.milestone_epochs]
        return lambda step: gamma ** sum(step >= milestone for milestone in at)
    if config.schedule == "exponential":
        return lambda step: gamma ** (step / every)
    if config.schedule == "inverse":
        return lambda step: 1 / (1 + step / slow)
    if config.schedule == "inverse-sqrt":
        return lambda step: 1 / math.sqrt(1 + step / slow)
    if config.schedule == "cosine":
        return lambda step: cosine(step, steps)
    if config.schedule == "cosine-restarts":
        longer = config.restart_multiplier or (1 if config.snapshots else 2)
        first = steps / sum(longer**period for period in range(config.snapshots or _PERIODS))
        if config.restart_epochs is not None:
            first = max(round(config.restart_epochs * steps_per_epoch), 1)
        return lambda step: cosine_restarts(step, first, longer)
    if config.schedule == "one-cycle":
        return lambda step: one_cycle(step, steps, config.cycle_rise)
    return lambda step: 1.0


def cosine(step: float, total: float) -> float:
    """Half a period, from 1 towards 0 (Loshchilov and Hutter, 2017, without restarts)."""
    return (1 + math.cos(math.pi * step / total)) / 2


def cosine_restarts(step: float, period: float, longer: int) -> float:
    """Cosines one after the other, each `longer` times the one before (Loshchilov and Hutter)."""
    if longer == 1:
        return cosine(step % period, period)
    while step >= period:
        step, period = step - period, period * longer
    return cosine(step, period)


def one_cycle(step: int, total: int, rise: float) -> float:
    """Up for the share `rise` of the steps, then down to nearly nothing (Smith and Topin, 2019)."""
    top = rise * total - 1
    if step < top:
        return 1 - (1 - _CYCLE_BEGINS) * cosine(step, top)
    return _CYCLE_ENDS + (1 - _CYCLE_ENDS) * cosine(step - top, total - 1 - top)


def plateau(losses: Sequence[float], factor: float, patience: int) -> float:
    """Falls by `factor` whenever more than `patience` epochs in a row brought no lower loss."""
    multiplier, lowest, without = 1.0, math.inf, 0
    for loss in losses:
        if loss < lowest * (1 - _PLATEAU_THRESHOLD):
            lowest, without = loss, 0
        else:
            without += 1
        if without > patience:
            multiplier, without = multiplier * factor, 0
    return multiplier
