"""Devices: which one, its precision (autocast), memory formats, torch.compile."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from cnnft.config.choices import Precision
from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.machine import distributed

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move `network` to `device`, its convolutions' weights in channels-last memory format.

    Activations take that format from the weights, so that kernels need not rearrange them
    (docs/speed.md). Apple's have no use for it.
    """
    network.to(device)
    if device.type != "mps":
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    return network


def keep_freed_memory() -> None:
    """For the rest of the process memory that is freed is used again, not given back.

    Otherwise glibc asks the system for every large tensor anew, which fills it with zeros page by
    page (docs/speed.md has what that takes). Commands that compute on a CPU do this; a library
    leaves the process that uses it alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


@contextmanager
def in_one_thread() -> Iterator[None]:
    """What torch computes on the CPU meanwhile it computes in the calling thread alone.

    For many small operations: threads that wait for each other at the end of each take longer than
    one, and many times longer where other processes use the processors too (docs/speed.md).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_precision(name: Precision | Literal["auto"], device: torch.device) -> Precision:
    """auto: bfloat16 on a CUDA GPU, float16 on one that does not have it, else float32.

    On a CPU some networks train slower with 16 bits (docs/speed.md), so it is for the user to say.

    Raises:
        UsageError: the device does not compute in it.
    """
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    try:
        with autocast(name, device):
            one = torch.ones(1, 1, device=device)
            computed = (one @ one).dtype
    except Exception as error:  # torch raises a different kind for every backend
        raise UsageError(_CANNOT.format(name, device, f" ({first_line(error)})")) from error
    if computed is not getattr(torch, name):
        raise UsageError(_CANNOT.format(name, device, ""))
    return name


_CANNOT = "--precision {} cannot be used on {}{}; try --precision float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Within it networks compute in `precision` where that is safe; weights stay as they are."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def float32_at_least(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class OnItsWay:
    """A number that a device has been asked for.

    Reading it waits for what computes it, not for what the device is asked for afterwards, as
    `tensor.item()` does: a GPU that has caught up with its process stands idle.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copied: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


def seed_generators(seed: int, device: torch.device) -> None:
    """Of the CPU and of `device`. `torch.manual_seed` notes for each kind of device that is not in
    use from where it was called, which takes longer than all else a step does beside computing.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Compiled(nn.Module):
    """The network, compiled for each new shape of its input when that first comes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        from torch._dynamo.exc import TorchDynamoException  # which takes a second to import

        self._refused = TorchDynamoException
        self.compiled = torch.compile(network)

    def forward(self, pixels: Tensor) -> Tensor:
        try:
            result: Tensor = self.compiled(pixels)
        except self._refused as error:
            raise CnnftError(
                f"--compile: this network cannot be compiled here ({first_line(error)}): leave it "
                "out"
            ) from error
        return result


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU. Of several processes each takes its own GPU.

    Raises:
        UsageError: no device of that name, or it is not there.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        alone = distributed.world_size == 1  # Apple's GPUs cannot compute together
        name = "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.world_size > 1:
        name = f"cuda:{distributed.local_rank}"
    try:
        device = torch.device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(1, device=device).cpu()
    except Exception as error:  # torch raises a different kind for every backend it lacks
        raise UsageError(
            f"--device {name} cannot be used here ({first_line(error)}); try --device cpu"
        ) from error
    return device
