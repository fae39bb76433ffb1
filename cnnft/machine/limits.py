"""Limits that the system sets to this process: open files, threads."""

import math
import os
import threading
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


def compute_in_one_thread_where_few_are_allowed() -> None:
    """Libraries that compute start a thread for each processor, and end the process, or crash,
    where the system allows no more; they read these variables when they are first imported.
    """
    if not allows_threads(4 * (os.cpu_count() or 1)):  # several libraries, and those that read
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


def allows_threads(count: int) -> bool:
    enough, threads = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=enough.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        return False
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    return True
