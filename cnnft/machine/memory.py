"""Free memory of a device, the machine or its container."""

from pathlib import Path

import torch

from cnnft.machine import distributed

_CGROUPS = tuple(
    (folder / limit, folder / used, folder / "memory.stat")
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
)
"""(limit, used, statistics) of a container, in versions 2 and 1."""
_MEMINFO = Path("/proc/meminfo")


def available(device: torch.device) -> int:
    """Free bytes for this process: on its GPU, or its part of the host's or the container's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was computed before left it to this process alone
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    room = max(min(_host_memory(), _container_memory()), 0)
    return int(room) // distributed.local_world_size


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
