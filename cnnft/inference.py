"""Networks -> log-probabilities. Everything after training goes through `infer`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnft import distributed
from cnnft.acceleration import keep_freed_memory
from cnnft.batches import Views
from cnnft.errors import CnnftError, UsageError, first_line


class NotANumberError(CnnftError):
    """The network's output is NaN."""


class Ensemble(nn.Module):
    """Networks that vote: the log of their mean softmax probability, (B, C)."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, pixels: Tensor) -> Tensor:
        log_probs = [network(pixels).float().log_softmax(dim=1) for network in self.networks]
        return torch.stack(log_probs).logsumexp(dim=0) - math.log(len(log_probs))


def infer(network: nn.Module, batches: Iterable[Views]) -> Iterator[tuple[Views, Tensor]]:
    """Yields each batch with the log of its mean softmax probability over the views, (B, C), on
    the CPU; B counts the readable images, in the order of `batch.indices`.
    """
    device = next(network.parameters()).device
    network.eval()
    for batch in batches:
        if batch.pixels is None:
            yield batch, torch.empty(0)
            continue
        with torch.inference_mode():
            images, views = batch.pixels.shape[:2]
            logits = network(batch.pixels.flatten(0, 1).to(device, non_blocking=True))
            log_probs = logits.float().log_softmax(dim=1).unflatten(0, (images, views))
            if log_probs.isnan().any():
                raise NotANumberError(
                    "the network gives no numbers (NaN): its weights are damaged, or it diverged"
                )
            yield batch, (log_probs.logsumexp(dim=1) - math.log(views)).cpu()


def infer_all(
    network: nn.Module,
    batches: Iterable[Views],
    paths: Sequence[str | Path],
    on_image: Callable[[], object] = lambda: None,
) -> Tensor:
    """(N, C) log-probabilities of all `paths`, each exactly once, in their order.

    `on_image` is called once for each.

    Raises:
        CnnftError: a file cannot be read.
    """
    rows: list[Tensor] = []
    for batch, log_probs in infer(network, batches):
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
