"""The training step, written once."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from cnnft.data.sampler import IGNORED, keyed_seed
from cnnft.machine import distributed
from cnnft.machine.devices import OnItsWay, autocast, float32_at_least, seed_generators
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
    """Mean objective over this process's images, scalar on the device: reading it waits for the
    device, so read it only to show it."""


@dataclass(frozen=True)
class EpochDone:
    """Means over the epoch's images as they were seen: augmented, by the network of that step."""

    epoch: int
    """From 0."""
    objective: float
    """What training minimises: with smoothing, class weights, distillation, auxiliary losses."""
    loss: float
    """Plain cross-entropy, to compare with the loss on val."""
    accuracy: float
    """A mixed image is classified right as the class that has the greatest share in it."""
    seconds: float


def train(
    state: TrainState,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    unfinished: bool = False,
) -> Iterator[StepDone | EpochDone]:
    """Take one step per batch (pixels (B, 3, H, W), labels (B,)); yield after each, and each epoch.

    At every yield the state is consistent: the caller may evaluate, save, or stop for good; so it
    is while a batch is waited for. `unfinished`: an epoch whose steps are taken has not ended yet.
    Randomness in the batch (mixup) and the network (dropout, stochastic depth) is seeded from
    (seed, step, rank), so that it does not depend on what happened in between.

    Raises:
        NonFiniteLossError: more often than `max_skipped_steps`. A GPU computes ahead of this
            process, which looks at the loss of the step before instead of waiting.
    """
    device = next(state.network.parameters()).device
    network = distributed.data_parallel(state.forward_module or state.network, device)
    modes = train_modes(state.network, state.keep_statistics)
    buffers = Buffers(state.network)
    unread: tuple[int, OnItsWay] | None = None
    start = time.monotonic()
    if unfinished:
        yield _end_of_epoch(state, start)
    for pixels, labels in batches:
        if state.step % state.keys.steps_per_epoch == 0:
            state.totals.zero_()
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        restore_modes(state.network, modes)  # the caller may have evaluated
        buffers.save()
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * state.schedule(state.step)

        sums = _gradients(state, network, pixels, labels, objective, buffers)
        may_skip = state.skipped_steps < state.max_skipped_steps
        if may_skip and distributed.any_rank(not _usable(state, sums[0]))[0]:
            _skip(state, buffers)
        else:
            present = state.step, OnItsWay(sums[0])
            if device.type == "cpu":
                _require_finite(state, *present)
            elif unread is not None:
                _require_finite(state, *unread)
            unread = present
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
        yield StepDone(epoch, state.step, images, sums[0] / sums[3])
        if state.step % state.keys.steps_per_epoch == 0:
            yield _end_of_epoch(state, start)
            start = time.monotonic()


class Buffers:
    """A network's buffers, such as running statistics, as they were before a step."""

    def __init__(self, network: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}  # at once a GPU copies those of one alone
        for buffer in network.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self.present = list(by_type.values())
        self.saved = [[buffer.clone() for buffer in some] for some in self.present]

    def save(self) -> None:
        for saved, present in zip(self.saved, self.present, strict=True):
            torch._foreach_copy_(saved, present)

    def restore(self) -> None:
        for saved, present in zip(self.saved, self.present, strict=True):
            torch._foreach_copy_(present, saved)


def _gradients(
    state: TrainState,
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    objective: Objective,
    buffers: Buffers,
) -> Tensor:
    """Set all gradients to those of the batch's mean objective; in parts if memory runs out.

    Returns this process's sums, (4,): see `TrainState.totals`.
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
        buffers.restore()  # else running statistics would see some images twice
        _log.warning(
            "out of memory: %d images are computed at once from now on, and their gradients added "
            "up, so the step is the same but for BatchNorm, which sees %d images",
            *[state.micro_batch] * 2,
        )


def _gradients_in_parts(
    state: TrainState, network: nn.Module, pixels: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    state.optimizer.zero_grad()
    # The wrapper of several processes takes the mean of their gradients, and we want the sum.
    weight = distributed.world_size / state.keys.size(state.step)
    parts = math.ceil(len(labels) / (state.micro_batch or len(labels)))
    sums = torch.zeros_like(state.totals)
    images = torch.tensor(state.keys.own(state.step)).tensor_split(parts)
    with _seeded(state, pixels.device):
        pixels, targets = state.mix(pixels, labels)
        split = zip(pixels.tensor_split(parts), targets.tensor_split(parts), images, strict=True)
        for part, (some_pixels, labels, some_images) in enumerate(split, start=1):
            against = [labels]
            if state.soft_targets is not None:
                against.append(state.soft_targets(some_pixels, some_images.tolist()))
            with nullcontext() if part == parts else distributed.no_sync(network):
                with autocast(state.precision, pixels.device):
                    outputs = all_logits(network(some_pixels))
                logits, *auxiliary = map(float32_at_least, outputs)
                loss = objective(logits, *against)
                for other in auxiliary:
                    loss = loss + AUXILIARY_WEIGHT * objective(other, *against)
                state.scaler.scale(loss * weight).backward()
            sums += _sums(loss.detach(), logits.detach(), labels).to(sums)
    return sums


@contextmanager
def _seeded(state: TrainState, device: torch.device) -> Iterator[None]:
    """Random numbers in it depend on (seed, step, rank); the caller's generators are restored."""
    seed = keyed_seed("step", state.keys.seed, state.step, distributed.rank)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_generators(seed, device)
        yield


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    main = labels if labels.ndim == 1 else labels.argmax(dim=1)
    correct = (logits.argmax(dim=1) == main).sum()
    plain = cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, plain, correct, (main != IGNORED).sum()])


def _usable(state: TrainState, loss: Tensor) -> bool:
    """Whether the loss and all gradients are finite; waits for the device."""
    if state.scaler.is_enabled():  # gradients that it has scaled may be infinite, and it looks
        return bool(loss.isfinite())
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    return bool(loss.isfinite() & get_total_norm(gradients).isfinite())


def _skip(state: TrainState, buffers: Buffers) -> None:
    """Restore what the step changed; the learning-rate schedule moves on."""
    _log.warning("step %d: the loss is not finite; the step is skipped", state.step + 1)
    state.skipped_steps += 1
    buffers.restore()


def _require_finite(state: TrainState, step: int, loss: OnItsWay) -> None:
    if not math.isfinite(value := loss.read()):
        rates = {
            group["initial_lr"] * state.schedule(step) for group in state.optimizer.param_groups
        }
        shown = " and ".join(f"{rate:g}" for rate in sorted(rates))
        raise NonFiniteLossError(
            f"the loss of step {step + 1} is {value}, at learning rate {shown}", step
        )


def _end_of_epoch(state: TrainState, start: float) -> EpochDone:
    """Over the images of all processes, since the time `start`."""
    objective, loss, correct, images = distributed.all_reduce_sum(state.totals).tolist()
    if not math.isfinite(objective):
        raise NonFiniteLossError(f"the summed loss of the epoch is {objective}", state.step - 1)
    distributed.broadcast_buffers(state.network)
    if state.average is not None:
        distributed.broadcast_buffers(state.average.module)
    images = max(images, 1)  # every step may have been skipped
    means = objective / images, loss / images, correct / images
    return EpochDone(state.step // state.keys.steps_per_epoch - 1, *means, time.monotonic() - start)


def all_logits(output: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The logits, and those of auxiliary classifiers, which some networks give while they train."""
    if isinstance(output, Tensor):
        return [output]
    return [logits for logits in output if logits is not None]
