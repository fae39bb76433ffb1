"""What the system refuses gets one sentence that is right about its cause."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from cnnft.cli.causes import explain
from cnnft.machine.files import write_whole
from cnnft.machine.limits import compute_in_one_thread_where_few_are_allowed

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error "
    "[127.0.0.1]:9624: Connection reset by peer. This is typically caused by a remote worker "
    "hanging or bugs in the application."
)


def os_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([file] if file else []))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory: this process"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "GPU is out of"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (os_error(errno.EAGAIN), "no more threads"),
        (os_error(errno.ENOMEM), "out of memory"),
        (os_error(errno.EMFILE, "a.jpg"), "too many open files: raise"),
        (os_error(errno.ENOSPC, "a. b/c"), "a. b/c: No space left on device: free some space"),
        (os_error(errno.ENOSPC), "No space left on device: free some space"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]"), "TMPDIR"),
        (RuntimeError(GLOO), "lost (Read error [127.0.0.1]:9624: Connection reset by peer): what"),
        (torch.distributed.DistNetworkError("Broken pipe"), "connection to another of the proc"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "see nvidia-smi"),
        (os_error(errno.EACCES, "NCCL/a.jpg"), "NCCL/a.jpg: Permission denied"),
        (KeyError("x"), "unexpected KeyError: 'x' (this is a bug"),
    ],
)  # fmt: skip
def test_errors_are_told_by_their_cause(error: Exception, words: str) -> None:
    assert words in explain(error)


def test_memory_that_torch_cannot_have_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert explain(raised.value).startswith("out of memory")


def run_limited(limits: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`cnnft` where Python code has set limits before."""
    code = f"import resource, threading\n{limits}\nfrom cnnft.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))", "too little memory (ulimit -v)"),
        # what OpenBLAS does where it may start no thread
        ("import signal, cnnft.cli.app\n"
         "def refuse(*_): raise RuntimeError(\"can't start new thread\")\n"
         "threading.Thread.start = refuse\n"
         "cnnft.cli.app.check.command.__globals__['console'].progress = "
         "lambda *_, **__: signal.raise_signal(signal.SIGINT)", "no more threads"),
    ],
)  # fmt: skip
def test_little_is_allowed(limits: str, words: str, tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "a.jpg", b"")
    ended = run_limited(limits, "check", str(tmp_path))
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert words in ended.stderr


@pytest.mark.parametrize(("most", "expected"), [(1, "1"), (10_000, None)])
def test_libraries_compute_in_one_thread_where_few_are_allowed(
    monkeypatch: pytest.MonkeyPatch, most: int, expected: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {})
    start, before = threading.Thread.start, threading.active_count()

    def limited(thread: threading.Thread) -> None:
        if threading.active_count() >= before + most:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    compute_in_one_thread_where_few_are_allowed()
    assert os.environ.get("OPENBLAS_NUM_THREADS") == expected
    assert threading.active_count() == before
