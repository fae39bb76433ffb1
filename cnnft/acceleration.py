"""How a device computes quickest what is to be computed, whatever it is."""

import ctypes
import sys

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move `network` to `device`, its convolutions' weights channels last.

    Activations take that order from the weights; kernels need not rearrange them then
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
    page: a third of the time of training mobilenetv2 on a CPU (docs/speed.md).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
