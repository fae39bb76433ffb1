"""The training step, written once."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cnnft.data.sampler import IGNORED, keyed_seed
from cnnft.machine import distributed
from cnnft.machine.devices import autocast, float32_at_least
from cnnft.models.freezing import restore_modes, train_modes
from cnnft.training.losses import Objective
from cnnft.training.state import NonFiniteLossError, TrainState

AUXILIARY_WEIGHT = 0.4
"""Of the loss of an auxiliary classifier (as PyTorch's tutorial weighs Inception v3's)."""

_log = logging.getLogger(__name__)


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
        NonFiniteLossError: more often than `max_skipped_steps`. A GPU computes ahead of this
            process, which looks at the loss of the step before instead of waiting.
    """
    device = next(state.network.parameters()).device
    network = distributed.data_parallel(state.forward_module or state.network, device)
    modes = train_modes(state.network, state.keep_statistics)
    unread: tuple[int, Tensor] | None = None
    start = time.monotonic()
    for pixels, labels in batches:
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        restore_modes(state.network, modes)  # the caller may have evaluated
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * state.schedule(state.step)
        tolerant = state.skipped_steps < state.max_skipped_steps
        statistics = [b.clone() for b in state.network.buffers()] if tolerant else []

        sums = _gradients(state, network, pixels, labels, objective)
        if tolerant and distributed.any_rank(not _usable(state, sums[0]))[0]:
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
            if size == 1 or distributed.world_size > 1:  # the others wait in the middle of a step
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
    weight = distributed.world_size / state.keys.size(state.step)
    parts = math.ceil(len(labels) / (state.micro_batch or len(labels)))
    sums = torch.zeros_like(state.totals)
    images = torch.tensor(state.keys.own(state.step)).tensor_split(parts)
    split = zip(pixels.tensor_split(parts), targets.tensor_split(parts), images, strict=True)
    for part, (some_pixels, labels, some_images) in enumerate(split, start=1):
        aims = [labels]
        if state.soft_targets is not None:
            aims.append(state.soft_targets(some_pixels, some_images.tolist()))
        with nullcontext() if part == parts else distributed.no_sync(network):
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
    state.skipped_steps += 1
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
    loss, correct, images = distributed.all_reduce_sum(state.totals).tolist()
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the summed loss of the epoch is {loss}", state.step - 1)
    state.totals.zero_()
    distributed.broadcast_buffers(state.network)
    if state.average is not None:
        distributed.broadcast_buffers(state.average.module)
    images = max(images, 1)  # every step may have been left out
    return loss / images, correct / images


def all_logits(output: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The logits, and those of auxiliary classifiers, which some networks give while they train."""
    if isinstance(output, Tensor):
        return [output]
    return [logits for logits in output if logits is not None]
