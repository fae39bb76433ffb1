"""Free memory of a device, the machine or its container."""

from pathlib import Path

import psutil
import torch

from cnnft.machine import distributed


def available(device: torch.device) -> int:
    """Free bytes for this process: on its GPU, or its part of the host's or the container's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was computed before left it to this process alone
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    room = max(min(psutil.virtual_memory().available, container_memory()), 0)
    return int(room) // distributed.local_world_size


def container_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Free bytes below the limit of this process's container (cgroup version 2 or 1).

    Infinite where there is no limit. psutil sees the host alone.
    """
    version_2 = (cgroup, "memory.max", "memory.current")
    version_1 = (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder, limit, used in (version_2, version_1):
        try:
            lines = (folder / "memory.stat").read_text().splitlines()
            cached = dict(line.split() for line in lines)
            # The page cache counts as used until somebody needs the room.
            files = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))
            return int((folder / limit).read_text()) - int((folder / used).read_text()) + files
        except (OSError, ValueError):  # no such file; no limit is written "max"
            continue
    return float("inf")
