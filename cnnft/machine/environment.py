"""What a computation ran on: the versions and the machine that its numbers may depend on."""

import platform
from importlib.metadata import version

import torch

from cnnft import __version__
from cnnft.machine import distributed


def environment(device: torch.device) -> dict[str, str]:
    """Name -> version or description; `threads` because sums on a CPU depend on their number."""
    libraries = ("torch", "torchvision", "timm", "numpy", "pillow")
    on_cuda = device.type == "cuda"
    return {
        "cnnft": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "platform": platform.platform(),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if on_cuda else str(device),
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size),
    }
