"""`--batch-size auto`: the largest batch whose training step fits, found by trying and halving."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft.config.choices import Precision
from cnnft.machine import distributed
from cnnft.machine.devices import autocast
from cnnft.models.freezing import SMALL_BATCH, train_mode
from cnnft.training.step import all_logits

LARGEST = {"cuda": 256, "cpu": 32}
"""By device, in each process. Up to 256 images the rate that grows with the batch is the usual one
(Goyal et al., 2017); a CPU is no faster with more than 32 (docs/speed.md)."""
LEAST_STEPS = 10
"""An epoch of fewer steps learns little, whatever fits."""
_STATE = 2
"""Tensors that an optimizer such as Adam will keep for each weight."""


def largest_batch(network: nn.Module, size: int, images: int, precision: Precision) -> int:
    """A power of two for images of size × size pixels, over all processes.

    At most LARGEST in each, and small enough for LEAST_STEPS steps in an epoch of `images`, but not
    so small that BatchNorm cannot use it. On a GPU the step is tried, and halved while it does not
    fit; the memory of a CPU is not tried, for want of an error that one survives.
    """
    device = next(network.parameters()).device
    limit = LARGEST.get(device.type, LARGEST["cpu"]) * distributed.world_size
    batch = _power_of_two(min(limit, max(images / LEAST_STEPS, min(SMALL_BATCH, images))))
    if device.type != "cuda":
        return batch
    own = max(batch // distributed.world_size, 1)
    while own > 1 and not _fits(network, size, own, precision):
        own //= 2
    return min(distributed.gather([own])) * distributed.world_size if own < batch else batch


def _power_of_two(most: float) -> int:
    return 1 << (int(most).bit_length() - 1)


def _fits(network: nn.Module, size: int, images: int, precision: Precision) -> bool:
    """Whether forward and backward pass of so many images fit, beside the optimizer's state."""
    device = next(network.parameters()).device
    buffers = [buffer.clone() for buffer in network.buffers()]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    train_mode(network)
    try:
        with torch.random.fork_rng([device]):
            reserved = torch.empty(_STATE * trained, device=device)
            pixels = torch.zeros(images, 3, size, size, device=device)
            labels = torch.zeros(images, dtype=torch.long, device=device)
            with autocast(precision, device):
                outputs = all_logits(network(pixels))
            losses: list[Tensor] = [cross_entropy(logits, labels) for logits in outputs]
            torch.stack(losses).sum().backward()
            del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        network.zero_grad(set_to_none=True)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
        torch.cuda.empty_cache()
