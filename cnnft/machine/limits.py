"""Limits that the system sets to this process: how many files it may have open."""

import math
from contextlib import suppress

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]


def raise_open_files() -> None:
    """As many as the system allows without asking: 256 on macOS are few, and 1024 elsewhere."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that it is infinite, and allows less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files_left() -> float:
    """How many more this process may open."""
    if resource is None:
        return math.inf
    import psutil

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft - psutil.Process().num_fds()
