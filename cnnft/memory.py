"""How many images fit: what a training step keeps for each of them, and what the machine has."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import distributed
from cnnft.acceleration import autocast
from cnnft.config import Precision
from cnnft.freezing import train_mode
from cnnft.training import all_logits

LARGEST = 256
"""Up to here the learning rate that grows with the batch is the usual one (Goyal et al., 2017)."""
_LARGEST_ON_CPU = 32
LEAST_STEPS = 10
"""An epoch of fewer steps learns little, whatever fits."""
_RESERVED = 2.0
"""Workspaces and gradients of activations, times what is kept."""

_CGROUPS = tuple(
    (folder / limit, folder / used, folder / "memory.stat")
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
)
"""(limit, used, statistics) of a container, in versions 2 and 1."""
_MEMINFO = Path("/proc/meminfo")


def largest_batch(
    network: nn.Module, size: int, images: int, copies: float, precision: Precision = "float32"
) -> int:
    """The largest power of two whose training step fits the free memory of all devices.

    At most LARGEST, and small enough for LEAST_STEPS steps in an epoch of `images`. `copies`: what
    training keeps of each weight besides it, such as its gradient and momentum.
    """
    device = next(network.parameters()).device
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    free = available(device) - copies * trained
    each = bytes_per_image(network, size, precision)
    fits = min(distributed.gather([free / (_RESERVED * each)]))
    most = max(min(fits * distributed.world, LARGEST, images / LEAST_STEPS), 1)
    return 1 << (int(most).bit_length() - 1)


def largest_inference_batch(network: nn.Module, size: int, views: int) -> int:
    """How many images, each with so many views, to compute at once: the largest power of two that
    fits the free memory, and is not slower than smaller ones (docs/speed.md).
    """
    device = next(network.parameters()).device
    fits = available(device) / (_RESERVED * _largest_step(network, size))
    most = max(min(fits, LARGEST if device.type == "cuda" else _LARGEST_ON_CPU) / views, 1)
    return 1 << (int(most).bit_length() - 1)


def _largest_step(network: nn.Module, size: int) -> int:
    """Bytes of what enters and leaves a module, for an image, in the module where it is most."""
    steps = [0]

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        steps.append(sum(tensor.nbytes for tensor in tensors))

    pixels = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.inference_mode():
            network.eval()(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return max(steps) + pixels.nbytes


def bytes_per_image(network: nn.Module, size: int, precision: Precision = "float32") -> int:
    """What the forward pass keeps of each image of size × size pixels for the backward pass."""
    network = copy.deepcopy(network)  # trying it changes BatchNorm statistics
    train_mode(network)
    return (_kept(network, 4, size, precision) - _kept(network, 2, size, precision)) // 2


def _kept(network: nn.Module, images: int, size: int, precision: Precision) -> int:
    device = next(network.parameters()).device
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    pixels = torch.zeros(images, 3, size, size, device=device)
    labels = torch.zeros(images, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        with autocast(precision, device):
            outputs = all_logits(network(pixels))
        loss = sum(cross_entropy(logits, labels) for logits in outputs)
    assert isinstance(loss, Tensor)
    return sum(kept.values()) + pixels.nbytes


def available(device: torch.device) -> int:
    """Free bytes for this process: on its GPU, or its part of the host's or the container's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was computed before left it to this process alone
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    room = max(min(_host_memory(), _container_memory()), 0)
    return int(room) // distributed.local_world


def _container_memory() -> float:
    for limit, used, statistics in _CGROUPS:
        try:
            cached = dict(line.split() for line in statistics.read_text().splitlines())
            # Files that were read count as used until somebody needs the room.
            files = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))
            return int(limit.read_text()) - int(used.read_text()) + files
        except (OSError, ValueError):  # no such file; no limit is written "max"
            continue
    return float("inf")


def _host_memory() -> int:
    try:
        lines = _MEMINFO.read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(found.split()[1])
    except (OSError, StopIteration):
        return 4 * 2**30  # not Linux: a guess on the safe side
