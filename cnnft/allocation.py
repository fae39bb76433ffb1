"""Memory that a CPU's computation frees stays with the process, to be used again."""

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h
_THRESHOLDS = (2**30, 2**25)
"""Bytes; where the first is more than the C library allows, the second is not."""


def keep_freed_memory() -> None:
    """Ask glibc not to give blocks back to the kernel; other C libraries are left as they are.

    A network's activations are large blocks that live for an instant. By default each is mapped
    anew, and the kernel clears every page of it when it is first written: docs/speed.md has how
    much of the time that takes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        any(mallopt(_M_MMAP_THRESHOLD, size) for size in _THRESHOLDS)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
