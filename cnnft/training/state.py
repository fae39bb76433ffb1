"""`TrainState`: all that a training step reads and changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel

from cnnft.config.choices import Precision
from cnnft.data.augmentation import Mix
from cnnft.data.sampler import KeyedBatches
from cnnft.errors import CnnftError
from cnnft.machine import distributed
from cnnft.models.freezing import changing


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
    """Mixup or CutMix of a batch."""
    soft_targets: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    """(pixels, which images they are) -> the teachers' logits, which the objective distils from."""
    before_step: Callable[[], None] = lambda: None
    """Constraints on the gradients, such as clipping."""
    after_step: Callable[[], None] = lambda: None
    """Constraints on the weights, such as max-norm."""
    forward_module: nn.Module | None = None
    """Computes the network's logits with the same trained layers: from cached features, where
    batches are those, or with BatchNorm folded. None: the network."""
    precision: Precision = "float32"
    """Autocast dtype of the logits. Losses and weights are float32 in any case."""
    average: AveragedModel | None = None
    """Of the weights after the steps that `averaged` names."""
    averaged: Callable[[int], bool] = lambda step: True
    """Steps taken -> whether these weights go into the average."""
    micro_batch: int | None = None
    """Gradient accumulation: images per forward pass in each process. None: all. Halved where they
    do not fit the device's memory."""
    max_skipped_steps: int = 0
    """Steps that may be skipped because their loss is not finite."""
    step: int = 0
    """Steps taken so far."""
    skipped_steps: int = 0
    """So far."""
    scaler: GradScaler = field(init=False)
    """Small gradients would be 0 in float16; it scales them, and skips steps where they become too
    large. With another precision it does nothing."""
    totals: Tensor = field(init=False)
    """Sums over the present epoch so far, in this process, on the device, (4,): the objective, the
    plain cross-entropy, images classified right, images."""

    def __post_init__(self) -> None:
        device = next(self.network.parameters()).device
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.totals = torch.zeros(4, dtype=exact, device=device)
        self.scaler = GradScaler(device.type, enabled=self.precision == "float16")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors by name, and JSON values; every process has to ask.

        Raises:
            NonFiniteLossError: the state is not worth keeping.
        """
        tensors = self._weights()
        optimizer = _without_tensors(self.optimizer.state_dict(), "optimizer", tensors)
        tensors["totals"] = distributed.all_reduce_sum(self.totals)
        if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
            raise NonFiniteLossError("the loss or a weight is not finite", self.step - 1)
        values = {
            "step": self.step,
            "micro_batch": self.micro_batch,
            "skipped_steps": self.skipped_steps,
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
                    # In the memory format that the optimizer had given it.
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if distributed.is_main:  # it had the sum of all processes
            self.totals.copy_(tensors["totals"])
        self.step, self.skipped_steps = values["step"], values["skipped_steps"]
        if self.scaler.is_enabled() and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        sizes = [size for size in (self.micro_batch, values["micro_batch"]) if size]
        self.micro_batch = min(sizes, default=None)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; the tensors in it are moved to `tensors`, named after their place.

    An optimizer's state may hold step counts, None, lists of tensors; and numbers as keys, tuples
    and dtypes, which JSON does not know.
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
