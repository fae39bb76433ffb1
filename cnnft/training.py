"""The training step, written once."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnft.batches import keyed_seed
from cnnft.freezing import train_mode
from cnnft.optim import Multiplier

AUXILIARY_WEIGHT = 0.4
"""Of the loss of an auxiliary classifier (as PyTorch's tutorial weighs Inception v3's)."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels (B,)) -> mean loss over the batch."""


@dataclass
class TrainState:
    """All that a step reads and changes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Multiplier
    steps_per_epoch: int
    seed: int
    keep_statistics: Sequence[nn.Module] = ()
    """BatchNorm layers that train but keep their pretrained statistics."""
    step: int = 0
    """Steps taken so far."""
    seen: int = 0
    """Images in the present epoch so far."""
    totals: Tensor | None = None
    """Their summed loss, and how many were classified right: (2,), on the device."""

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs but `step` and `seen`, by name."""
        assert self.totals is not None
        kept = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    kept[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        return {**kept, "totals": self.totals}

    def restore(self, tensors: dict[str, Tensor], step: int, seen: int) -> None:
        """Go back to the state that `tensors` was taken in."""
        network, optimizer = {}, self.optimizer.state_dict()
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "network":
                network[rest] = tensor
            elif kind == "optimizer":
                index, _, value = rest.partition(".")
                optimizer["state"].setdefault(int(index), {})[value] = tensor
        self.network.load_state_dict(network)
        self.optimizer.load_state_dict(optimizer)
        device = next(self.network.parameters()).device
        self.step, self.seen, self.totals = step, seen, tensors["totals"].to(device)


@dataclass(frozen=True)
class StepDone:
    epoch: int
    step: int
    """Within the run, from 1."""
    images: int
    loss: Tensor
    """Scalar on the device: reading it waits for the device, so read it only to show it."""


@dataclass(frozen=True)
class EpochDone:
    epoch: int
    """From 0."""
    loss: float
    """Mean over the epoch's images, as they were seen: augmented, by the network of that step."""
    accuracy: float
    seconds: float


def train(
    state: TrainState, batches: Iterable[tuple[Tensor, Tensor]], objective: Objective
) -> Iterator[StepDone | EpochDone]:
    """Take one step per batch (pixels (B, 3, H, W), labels (B,)); yield after each, and each epoch.

    At every yield the state is consistent: the caller may evaluate, save, or stop for good.
    Randomness inside the network (dropout, stochastic depth) is seeded from (seed, step), so that
    it does not depend on what happened in between.
    """
    device = next(state.network.parameters()).device
    precision = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    if state.totals is None:
        state.totals = torch.zeros(2, dtype=precision, device=device)
    start = time.monotonic()
    for pixels, labels in batches:
        pixels, labels = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        # At every step, because the caller may have evaluated.
        train_mode(state.network, state.keep_statistics)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * state.schedule(state.step)
        torch.manual_seed(keyed_seed("step", state.seed, state.step))

        logits, *auxiliary = all_logits(state.network(pixels))
        loss = objective(logits, labels)
        for other in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * objective(other, labels)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()

        epoch = state.step // state.steps_per_epoch
        state.step += 1
        state.seen += len(labels)
        correct = (logits.argmax(dim=1) == labels).sum()
        state.totals += torch.stack([loss.detach() * len(labels), correct]).to(precision)
        yield StepDone(epoch, state.step, len(labels), loss.detach())
        if state.step % state.steps_per_epoch == 0:
            mean_loss, accuracy = (state.totals / state.seen).tolist()
            state.totals.zero_()
            state.seen = 0
            yield EpochDone(epoch, mean_loss, accuracy, time.monotonic() - start)
            start = time.monotonic()


def all_logits(output: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The logits, and those of auxiliary classifiers, which some networks give while they train."""
    if isinstance(output, Tensor):
        return [output]
    return [logits for logits in output if logits is not None]
