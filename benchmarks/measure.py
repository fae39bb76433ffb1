"""A command as a process of its own: its time, and the memory that it and its children hold."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
INTERVAL = 0.2
"""Seconds between two looks at the memory: a shorter peak may be missed."""
PATIENCE = 50
"""At least so many times as long as a look takes: it holds up what it looks at."""


class Measured(NamedTuple):
    seconds: float
    """From the start of the process to its end."""
    memory: int | None
    """Bytes at the peak; None where there is no /proc."""
    gpu_memory: int | None
    """More bytes than before, at the peak; None without nvidia-smi."""
    out: str


class FailedError(Exception):
    """The last line that the process said."""


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Run it in the root of the repository.

    Raises:
        FailedError: its exit code is not 0.
    """
    memory, gpu, gpu_before = 0, 0, gpu_memory()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=error)
        wait = INTERVAL
        while _runs(process, wait):
            begin = time.perf_counter()
            memory = max(memory, memory_of(process.pid))
            gpu = max(gpu, gpu_memory() or 0)
            wait = max(INTERVAL, PATIENCE * (time.perf_counter() - begin))
        seconds = time.perf_counter() - start
        for file in (out, error):
            file.seek(0)
        if process.returncode:
            lines = error.read().strip().splitlines()
            raise FailedError(lines[-1] if lines else f"exit code {process.returncode}")
        used = None if gpu_before is None else gpu - gpu_before
        return Measured(seconds, memory or None, used, out.read())


def _runs(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it still runs after so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def memory_of(pid: int) -> int:
    """Bytes that `pid` and all it started hold; pages that they share count once (Linux's PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:  # it has ended meanwhile, or there is no /proc
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return own + sum(map(memory_of, children))


def gpu_memory() -> int | None:
    """Bytes in use on the first GPU, whoever uses them."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True)
    return int(said.stdout) * 2**20 if said.returncode == 0 else None
