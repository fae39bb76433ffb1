"""How the learning rates go while training: pure functions of the step and of the losses on val."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cnnft.config.choices import Schedule
from cnnft.config.optimization import ScheduleConfig

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


@dataclass(frozen=True)
class Length:
    """How long training is, in epochs, and what its end is for."""

    epochs: int
    steps_per_epoch: int
    swa: int = 0
    """Last epochs that are averaged, at a constant rate."""
    snapshots: int = 0
    """Cosines of equal length, each of which ends in a snapshot."""

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def make_schedule(config: ScheduleConfig, length: Length) -> Multiplier:
    """`config.schedule`, after a linear warmup (Goyal et al., 2017).

    The schedule begins, at the full rate, where the warmup ends, and has the rest of training to
    run in. Milestones alone are counted from the start of training. Where the last epochs are
    averaged (SWA), the rate stays what it is when they begin (Izmailov et al., 2018).
    """
    warmup = warmup_steps(config, length)
    shape = _shape(config, length, warmup)
    warm_epochs = math.ceil(warmup / length.steps_per_epoch)
    averaging = length.steps - length.swa * length.steps_per_epoch

    def multiplier(step: int, val_losses: Sequence[float] = ()) -> float:
        step = min(step, averaging)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "plateau":
            seen = val_losses[warm_epochs : step // length.steps_per_epoch]
            return plateau(seen, config.step_gamma, config.plateau_patience)
        return shape(step - warmup)

    return multiplier


def warmup_steps(config: ScheduleConfig, length: Length) -> int:
    return min(round(config.warmup_epochs * length.steps_per_epoch), length.steps - 1)


def _shape(config: ScheduleConfig, length: Length, warmup: int) -> Callable[[int], float]:
    """Step since the warmup -> multiplier, of schedules that depend on nothing else."""
    per_epoch, steps = length.steps_per_epoch, length.steps - warmup
    gamma, every, slow = config.step_gamma, config.step_epochs * per_epoch, config.inverse_epochs
    milestones = [epoch * per_epoch - warmup for epoch in config.milestone_epochs(length.epochs)]
    period, longer = _first_period(config, length, steps)
    shapes: dict[Schedule, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "step": lambda step: gamma ** (step // every),
        "multistep": lambda step: gamma ** sum(step >= milestone for milestone in milestones),
        "exponential": lambda step: gamma ** (step / every),
        "inverse": lambda step: 1 / (1 + step / (slow * per_epoch)),
        "inverse-sqrt": lambda step: 1 / math.sqrt(1 + step / (slow * per_epoch)),
        "cosine": lambda step: cosine(step, steps),
        "cosine-restarts": lambda step: cosine_restarts(step, period, longer),
        "one-cycle": lambda step: one_cycle(step, steps, config.cycle_rise),
        "plateau": lambda step: 1.0,
    }
    return shapes[config.schedule]


def _first_period(config: ScheduleConfig, length: Length, steps: int) -> tuple[float, int]:
    """(steps of the first cosine, how many times longer each is than the one before)."""
    longer = config.restart_multiplier or (1 if length.snapshots else 2)
    if config.restart_epochs is not None:
        return max(round(config.restart_epochs * length.steps_per_epoch), 1), longer
    return steps / sum(longer**period for period in range(length.snapshots or _PERIODS)), longer


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
