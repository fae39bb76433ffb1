"""The training step, written once."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel

from cnnft import distributed
from cnnft.acceleration import autocast, float32_at_least
from cnnft.augmentation import Mix
from cnnft.batches import IGNORED, KeyedBatches, keyed_seed
from cnnft.config import Precision
from cnnft.errors import CnnftError
from cnnft.freezing import changing, restore_modes, train_modes
from cnnft.objectives import Objective

AUXILIARY_WEIGHT = 0.4
"""Of the loss of an auxiliary classifier (as PyTorch's tutorial weighs Inception v3's)."""

_log = logging.getLogger(__name__)


class NonFiniteLossError(CnnftError):
    """The loss, or a weight, is NaN or infinite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step
        """From 0."""


@dataclass
class TrainState:
    """All that a step reads and changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    """Step -> what the initial learning rates are multiplied by."""
    keys: KeyedBatches
    """Which images make up which step."""
    keep_statistics: Sequence[nn.Module] = ()
    """BatchNorm layers that train but keep their pretrained statistics."""
    mix: Mix = lambda pixels, labels: (pixels, labels)
    """What becomes of a batch at random, such as mixup."""
    teach: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    """(pixels, which images they are) -> a teacher's logits, for the objective to compare with."""
    before_step: Callable[[], None] = lambda: None
    """What is done to the gradients."""
    after_step: Callable[[], None] = lambda: None
    """What is done to the weights."""
    computing: nn.Module | None = None
    """What computes the network's logits, with the same trained layers: from activations inside it,
    where batches are those, or more quickly. None: the network."""
    precision: Precision = "float32"
    """In which the logits are computed. Losses and weights are float32 in any case."""
    average: AveragedModel | None = None
    """Of the weights after the steps that `averaged` names."""
    averaged: Callable[[int], bool] = lambda step: True
    """Steps taken -> whether these weights go into the average."""
    micro_batch: int | None = None
    """Images that are computed at once, in each process; their gradients add up to the batch's.
    None: all. Halved where they do not fit the device's memory."""
    tolerated: int = 0
    """Steps whose loss is not finite that may be left out."""
    step: int = 0
    """Steps taken so far."""
    left_out: int = 0
    """Such steps so far."""
    scaler: GradScaler = field(init=False)
    """Small gradients would be 0 in float16; it scales them, and leaves out steps where they become
    too large. Of another precision it does nothing."""
    totals: Tensor = field(init=False)
    """Of the present epoch so far, in this process, on the device, (3,): summed loss, images
    classified right, images."""

    def __post_init__(self) -> None:
        device = next(self.network.parameters()).device
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.totals = torch.zeros(3, dtype=exact, device=device)
        self.scaler = GradScaler(device.type, enabled=self.precision == "float16")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors by name, and JSON values; every process has to ask.

        Raises:
            NonFiniteLossError: the state is not worth keeping.
        """
        tensors = self._weights()
        optimizer = _without_tensors(self.optimizer.state_dict(), "optimizer", tensors)
        tensors["totals"] = distributed.total(self.totals)
        if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
            raise NonFiniteLossError("the loss or a weight is not finite", self.step - 1)
        values = {
            "step": self.step,
            "micro_batch": self.micro_batch,
            "left_out": self.left_out,
            "scaler": self.scaler.state_dict(),
            "optimizer": optimizer,
        }
        return tensors, values

    def _weights(self) -> dict[str, Tensor]:
        """What training changes of the network and its average; what is frozen is as pretrained."""
        names = changing(self.network, self.keep_statistics)
        networks = {"network": self.network}
        if self.average is not None:
            networks["average"] = self.average.module
        tensors = {
            f"{which}.{name}": tensor
            for which, network in networks.items()
            for name, tensor in network.state_dict().items()
            if name in names
        }
        if self.average is not None:
            tensors["averaged"] = self.average.n_averaged
        return tensors

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go back to the state that both were taken in."""
        for name, tensor in self._weights().items():
            tensor.copy_(tensors[name])
        self.optimizer.load_state_dict(_with_tensors(values["optimizer"], tensors))
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[name] = _like(parameter, value)
        if distributed.is_main:  # it had the sum of all processes
            self.totals.copy_(tensors["totals"])
        self.step, self.left_out = values["step"], values["left_out"]
        if self.scaler.is_enabled() and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        sizes = [size for size in (self.micro_batch, values["micro_batch"]) if size]
        self.micro_batch = min(sizes, default=None)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` in the order in memory that the optimizer had given it."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; the tensors in it are moved to `tensors`, named after their place.

    An optimizer's state holds what its author liked: step counts, None, lists of tensors; and keys
    that are numbers, tuples and types, which JSON does not know.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[k, _without_tensors(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        parts = [_without_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: parts}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _with_tensors(item, tensors) for key, item in items}
        case {"list": items}:
            return [_with_tensors(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(_with_tensors(item, tensors) for item in items)
        case {"dtype": name}:
            return getattr(torch, name)
    return value


@dataclass(frozen=True)
class StepDone:
    epoch: int
    step: int
    """Within the run, from 1."""
    images: int
    """In all processes."""
    loss: Tensor
    """Mean over this process's images, scalar on the device: reading it waits for the device, so
    read it only to show it."""


@dataclass(frozen=True)
class EpochDone:
    epoch: int
    """From 0."""
    loss: float
    """Mean over the epoch's images, as they were seen: augmented, by the network of that step."""
    accuracy: float
    """Alike; a mixed image is classified right as the class that has the greatest share in it."""
    seconds: float


def train(
    state: TrainState, batches: Iterable[tuple[Tensor, Tensor]], objective: Objective
) -> Iterator[StepDone | EpochDone]:
    """Take one step per batch (pixels (B, 3, H, W), labels (B,)); yield after each, and each epoch.

    At every yield the state is consistent: the caller may evaluate, save, or stop for good.
    Randomness in the batch (mixup) and the network (dropout, stochastic depth) is seeded from
    (seed, step, rank), so that it does not depend on what happened in between.

    Raises:
        NonFiniteLossError: more often than tolerated. A GPU computes ahead of this process, which
            looks at the loss of the step before instead of waiting.
    """
    device = next(state.network.parameters()).device
    network = distributed.parallel(state.computing or state.network, device)
    modes = train_modes(state.network, state.keep_statistics)
    unread: tuple[int, Tensor] | None = None
    start = time.monotonic()
    for pixels, labels in batches:
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        restore_modes(state.network, modes)  # the caller may have evaluated
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * state.schedule(state.step)
        tolerant = state.left_out < state.tolerated
        statistics = [b.clone() for b in state.network.buffers()] if tolerant else []

        sums = _gradients(state, network, pixels, labels, objective)
        if tolerant and distributed.anywhere(not _usable(state, sums[0]))[0]:
            _leave_out(state, statistics)
        else:
            if device.type == "cpu":
                _require_finite(state, state.step, sums[0])
            elif unread is not None:
                _require_finite(state, *unread)
            unread = state.step, sums[0]
            state.scaler.unscale_(state.optimizer)
            state.before_step()
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.after_step()
            state.totals += sums

        images, epoch = state.keys.size(state.step), state.step // state.keys.steps_per_epoch
        state.step += 1
        if state.average is not None and state.averaged(state.step):
            state.average.update_parameters(state.network)
        yield StepDone(epoch, state.step, images, sums[0] / sums[2])
        if state.step % state.keys.steps_per_epoch == 0:
            mean_loss, accuracy = _finish_epoch(state)
            yield EpochDone(epoch, mean_loss, accuracy, time.monotonic() - start)
            start = time.monotonic()


def _gradients(
    state: TrainState, network: nn.Module, pixels: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    """Set all gradients to those of the batch's mean loss; in smaller parts if memory runs out.

    Returns this process's (3,): summed loss, images classified right, images.
    """
    while True:
        try:
            return _gradients_in_parts(state, network, pixels, labels, objective)
        except torch.OutOfMemoryError:
            size = min(state.micro_batch or len(labels), len(labels))
            if size == 1 or distributed.world > 1:  # the others wait in the middle of a step
                raise
            state.micro_batch = (size + 1) // 2
        # Not before the exception is gone, which holds the tensors of what failed.
        torch.cuda.empty_cache()
        _log.warning(
            "out of memory: %d images are computed at once from now on, and their gradients added "
            "up, so the step is the same but for BatchNorm, which sees %d images",
            *[state.micro_batch] * 2,
        )


def _gradients_in_parts(
    state: TrainState, network: nn.Module, pixels: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    torch.manual_seed(keyed_seed("step", state.keys.seed, state.step, distributed.rank))
    pixels, targets = state.mix(pixels, labels)
    state.optimizer.zero_grad()
    # The wrapper of several processes takes the mean of their gradients, and we want the sum.
    weight = distributed.world / state.keys.size(state.step)
    parts = math.ceil(len(labels) / (state.micro_batch or len(labels)))
    sums = torch.zeros_like(state.totals)
    images = torch.tensor(state.keys.own(state.step)).tensor_split(parts)
    split = zip(pixels.tensor_split(parts), targets.tensor_split(parts), images, strict=True)
    for part, (some_pixels, labels, some_images) in enumerate(split, start=1):
        aims = [labels]
        if state.teach is not None:
            aims.append(state.teach(some_pixels, some_images.tolist()))
        with nullcontext() if part == parts else distributed.without_sync(network):
            with autocast(state.precision, pixels.device):
                outputs = all_logits(network(some_pixels))
            logits, *auxiliary = map(float32_at_least, outputs)
            loss = objective(logits, *aims)
            for other in auxiliary:
                loss = loss + AUXILIARY_WEIGHT * objective(other, *aims)
            state.scaler.scale(loss * weight).backward()
        main = labels if labels.ndim == 1 else labels.argmax(dim=1)
        correct = (logits.argmax(dim=1) == main).sum()
        sums += torch.stack([loss.detach(), correct, (main != IGNORED).sum()]).to(sums)
    return sums


def _usable(state: TrainState, loss: Tensor) -> bool:
    """Whether the loss and all gradients are finite; waits for the device."""
    if state.scaler.is_enabled():  # gradients that it has scaled may be infinite, and it looks
        return bool(loss.isfinite())
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    return bool(loss.isfinite() & get_total_norm(gradients).isfinite())


def _leave_out(state: TrainState, statistics: Sequence[Tensor]) -> None:
    """As if the step had not been computed; its learning rate is used up."""
    _log.warning("step %d: the loss is not finite; the step is left out", state.step + 1)
    state.left_out += 1
    for buffer, before in zip(state.network.buffers(), statistics, strict=True):
        buffer.copy_(before)


def _require_finite(state: TrainState, step: int, loss: Tensor) -> None:
    if not loss.isfinite():
        rates = {
            group["initial_lr"] * state.schedule(step) for group in state.optimizer.param_groups
        }
        told = " and ".join(f"{rate:g}" for rate in sorted(rates))
        raise NonFiniteLossError(
            f"the loss of step {step + 1} is {loss.item()}, at learning rate {told}", step
        )


def _finish_epoch(state: TrainState) -> tuple[float, float]:
    """(mean loss, accuracy) over the images of all processes."""
    loss, correct, images = distributed.total(state.totals).tolist()
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the summed loss of the epoch is {loss}", state.step - 1)
    state.totals.zero_()
    distributed.share_statistics(state.network)
    if state.average is not None:
        distributed.share_statistics(state.average.module)
    images = max(images, 1)  # every step may have been left out
    return loss / images, correct / images


def all_logits(output: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The logits, and those of auxiliary classifiers, which some networks give while they train."""
    if isinstance(output, Tensor):
        return [output]
    return [logits for logits in output if logits is not None]
