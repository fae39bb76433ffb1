"""What the machine refused, in a sentence: libraries raise it in many kinds, with few types."""

import re

from cnnft.errors import first_line
from cnnft.machine import limits

_NO_THREADS = (
    "the system allows this process no more threads or child processes (ulimit -u, or a "
    "container's limit on pids): raise it, or end others of your processes; --workers 0 needs "
    "fewest"
)
_CAUSES = {
    "CUDA out of memory|MPS backend out of memory|ALLOC_FAILED": (
        "the GPU is out of memory: lower --batch-size, or take a smaller --backbone or --image-size"
    ),
    "MemoryError|OutOfMemoryError|DefaultCPUAllocator|Cannot allocate memory|bad_alloc": (
        "out of memory: this process may have no more of it (the machine's, a container's limit, "
        "or ulimit -v); lower --workers or --batch-size, or take a smaller --backbone"
    ),
    "can't start new thread|PosixThread|Resource temporarily unavailable": _NO_THREADS,
    "Too many open files": (
        "too many open files: raise what the system allows (ulimit -n), or lower --workers"
    ),
    "failed to map segment": (
        "a library cannot be loaded ({reason}): this process may have too little memory "
        "(ulimit -v), or the library lies where no code may run (mounted noexec)"
    ),
    "No usable temporary directory": (
        "a temporary file cannot be written anywhere: set TMPDIR to a folder that has room"
    ),
    "No space left on device|Disk quota exceeded": (
        "{reason}: free some space, or choose another disk with --runs-dir, CNNFT_CACHE or TMPDIR"
    ),
    "gloo/gloo/|NCCL|^Dist[A-Z]": (
        "the connection to another of the processes is lost ({reason}): what it said, or "
        "torchrun says of it, is the cause; start torchrun again"
    ),
    "CUDA error|cuDNN error|CUBLAS_STATUS|AcceleratorError": (
        "the GPU reported an error ({reason}): see nvidia-smi; --device cpu does without it"
    ),
}
"""What an error's type and first line hold -> the sentence. The first that fits is taken."""


def explain(error: Exception) -> str:
    """A sentence for what the machine refused; the rest is our mistake."""
    text = first_line(error)
    reason = re.sub(r"^\[\S+:\d+\] |\. .*", "", text)  # gloo's place in its source, and advice
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the file, which may have any name
        reason = f"{error.filename}: {text}" if error.filename else text
    kind = type(error).__name__
    for words, sentence in _CAUSES.items():
        if re.search(words, f"{kind}: {text}"):
            return sentence.format(reason=reason)
    if isinstance(error, OSError) and error.strerror:
        return reason
    return f"unexpected {kind}: {text} (this is a bug: cnnft --debug COMMAND … shows where)"


def interrupted_by_itself() -> str | None:
    """Why a process interrupted itself: OpenBLAS does, where it may start no thread."""
    return None if limits.allows_threads(1) else _NO_THREADS
