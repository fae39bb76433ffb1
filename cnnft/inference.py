"""Networks -> log-probabilities. Everything after training goes through `infer`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnft import distributed
from cnnft.acceleration import autocast, float32_at_least, keep_freed_memory
from cnnft.batches import Views
from cnnft.config import Precision
from cnnft.errors import CnnftError, UsageError, first_line


class NotANumberError(CnnftError):
    """The network's output is NaN."""


class Ensemble(nn.Module):
    """Networks that vote: the log of their mean softmax probability, (B, C)."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, pixels: Tensor) -> Tensor:
        log_probs = [float32_at_least(n(pixels)).log_softmax(dim=1) for n in self.networks]
        return torch.stack(log_probs).logsumexp(dim=0) - math.log(len(log_probs))


def infer(
    network: nn.Module, batches: Iterable[Views], precision: Precision = "float32"
) -> Iterator[tuple[Views, Tensor]]:
    """Yields each batch with the log of its mean softmax probability over the views, (B, C), on
    the CPU; B counts the readable images, in the order of `batch.indices`.

    A batch is read when the next one has been begun, so that a GPU need not wait for its reader.
    """
    network.eval()
    before: tuple[Views, Tensor] | None = None
    for batch in batches:
        present = batch, _log_probs(network, batch.pixels, precision)
        if before is not None:
            yield _read(*before)
        before = present
    if before is not None:
        yield _read(*before)


@torch.inference_mode()
def _log_probs(network: nn.Module, pixels: Tensor | None, precision: Precision) -> Tensor:
    """(B, V, 3, H, W) -> (B, C), on the network's device."""
    if pixels is None:
        return torch.empty(0)
    device = next(network.parameters()).device
    images, views = pixels.shape[:2]
    with autocast(precision, device):
        logits = network(pixels.flatten(0, 1).to(device, non_blocking=True))
    log_probs = float32_at_least(logits).log_softmax(dim=1).unflatten(0, (images, views))
    return log_probs.logsumexp(dim=1) - math.log(views)


def _read(batch: Views, log_probs: Tensor) -> tuple[Views, Tensor]:
    return batch, require_numbers(log_probs.cpu())


def require_numbers(outputs: Tensor) -> Tensor:
    """`outputs`; raises `NotANumberError` where one is NaN."""
    if outputs.isnan().any():
        raise NotANumberError(
            "the network gives no numbers (NaN): its weights are damaged, or it diverged"
        )
    return outputs


def infer_all(
    network: nn.Module,
    batches: Iterable[Views],
    paths: Sequence[str | Path],
    on_image: Callable[[], object] = lambda: None,
    precision: Precision = "float32",
) -> Tensor:
    """(N, C) log-probabilities of all `paths`, each exactly once, in their order.

    `on_image` is called once for each.

    Raises:
        CnnftError: a file cannot be read.
    """
    rows: list[Tensor] = []
    for batch, log_probs in infer(network, batches, precision):
        for index, reason in batch.unreadable.items():
            raise CnnftError(f"{paths[index]} {reason}: the data changed meanwhile")
        rows.append(log_probs)
        for _ in batch.indices:
            on_image()
    return torch.cat(distributed.gather(rows))


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Of several processes each takes its own GPU.

    Raises:
        UsageError: no device of that name, or it is not there.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        alone = distributed.world == 1  # Apple's GPUs cannot compute together
        name = "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.world > 1:
        name = f"cuda:{distributed.local_rank}"
    try:
        device = torch.device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(1, device=device).cpu()
        if device.type == "cpu":
            keep_freed_memory()
    except Exception as error:  # torch raises a different kind for every backend it lacks
        raise UsageError(
            f"--device {name} cannot be used here ({first_line(error)}); try --device cpu"
        ) from error
    return device
