"""Worker processes: the same batches, whatever becomes of them; and no process is left."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Outcome, draw_folder
from torch import Tensor

from cnnft import CnnftError
from cnnft.data import loading
from cnnft.data.loading import Batches, Loading, worker_count
from cnnft.data.threads import ReadTimeoutError
from cnnft.data.workers import WorkerError, Workers
from cnnft.machine import limits

if sys.platform != "linux":
    pytest.skip("forks, and stops processes", allow_module_level=True)

Cli = Callable[..., Outcome]
KEYS = list(range(12))


def batch(key: int) -> tuple[int, Tensor, Tensor]:
    pixels = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) + key
    return key, pixels.float().contiguous(memory_format=torch.channels_last), torch.empty(0)


def names(key: int) -> list[str]:
    return [f"{key}.png"]


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() == []


def batches(fetch: Callable[[int], object] = batch, count: int = 2, timeout: float = 60) -> Batches:
    return Batches(fetch, KEYS, names, Loading(1, count, read_timeout=timeout))


def runs(pid: int) -> bool:
    """Whether it is more than a name that nobody has read yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop(*processes: psutil.Process) -> None:
    for process in processes:
        process.suspend()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_are_the_same_to_the_stride(count: int) -> None:
    found = batches(count=count)
    for _ in range(2):  # workers stay in between
        got = list(found)
        assert [key for key, *_ in got] == KEYS
        for key, pixels, empty in got:
            assert torch.equal(pixels, batch(key)[1]) and pixels.stride() == batch(key)[1].stride()
            assert empty.shape == (0,)
        assert len(children()) == count


def test_warnings_are_seen_between_two_batches() -> None:
    some = iter(batches(count=0))
    next(some)
    with pytest.warns(UserWarning, match="of a step"):
        warnings.warn("of a step", stacklevel=1)


def test_nothing_is_handed_over_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no space left on /dev/shm")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", refuse)
    assert len(list(batches())) == len(KEYS)


def test_one_that_stands_still_is_waited_for_so_long_and_its_files_are_named() -> None:
    some = iter(batches(timeout=0.3))
    assert next(some)[0] == 0
    stop(*children())
    start = time.monotonic()
    with pytest.raises(ReadTimeoutError, match=r"0\.3 seconds of \d+\.png.*--read-timeout"):
        list(some)
    assert time.monotonic() - start < 10


def test_one_that_stands_still_and_is_not_needed_harms_nobody() -> None:
    found = Batches(batch, KEYS[:1], names, Loading(1, 2, read_timeout=5))
    assert len(list(found)) == 1
    stop(children()[1])
    assert len(list(found)) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_one_that_does_not_even_read_what_it_is_to_do(count: int) -> None:
    def stand_still(key: list[int]) -> int:
        if key[0] == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return key[0]

    many = [[n] * 300_000 for n in range(12)]  # more than a socket holds
    loading = Loading(1, count, read_timeout=0.3)
    found = iter(Batches(stand_still, many, lambda key: [f"{key[0]}.png"], loading))
    with pytest.raises(ReadTimeoutError, match=r"0\.3 seconds of 4\.png"):
        list(found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_died_is_named(number: int) -> None:
    some = iter(batches())
    next(some)
    for child in children():
        child.send_signal(number)
    with pytest.raises(WorkerError, match=f"died \\({signal.Signals(number).name}\\).*--workers"):
        list(some)


def test_what_is_left_before_its_end_leaves_no_process() -> None:
    for kept in iter(batches()):
        assert kept[0] == 0
        break


def test_they_end_with_their_parent_whatever_ended_it_and_however_they_stand() -> None:
    ours, theirs = multiprocessing.Pipe()
    parent = os.fork()
    if not parent:
        try:
            workers = Workers(batch, 2, False)
            some = workers.map(KEYS, 60, names)
            next(some)
            stop(*children()[:1])
            theirs.send([child.pid for child in children()])
            time.sleep(60)
        finally:
            os._exit(1)
    pids = ours.recv()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pids) == 2 and not any(map(runs, pids))


def test_signals_to_the_group_of_the_parent_do_not_reach_them() -> None:
    some = iter(batches())
    next(some)
    assert os.getpgrp() not in [os.getpgid(child.pid) for child in children()]
    some.close()


def test_an_exception_in_one_is_raised_with_where_it_was() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        list(batches(lambda key: 1 // (3 - key)))
    assert "in a process that loads images" in raised.value.__notes__[0]


def test_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    with pytest.raises(CnnftError, match=r"temporarily unavailable.*--workers 0"):
        list(batches())


def test_where_fewer_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, started = multiprocessing.Process.start, []

    def some(process: multiprocessing.Process) -> None:
        if started:
            raise OSError(24, "Too many open files")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", some)
    assert len(list(batches(count=3))) == len(KEYS)
    assert "1 of 3 workers could be started" in caplog.text


def test_few_open_files_are_few_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for left, workers in ((1000, 8), (43, 3), (10, 0), (float("inf"), 8)):
        monkeypatch.setattr(loading, "open_files_left", lambda left=left: left)
        assert worker_count(8) == workers
    assert "3 of 8 workers" in caplog.text and "0 of 8 workers" in caplog.text


def test_the_limit_of_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert limits.open_files_left() < 256
        limits.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["finetune", "predict", "evaluate"])
def test_a_command_whose_worker_stands_still(
    cnnft: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 10, first_seed=100)
    receive = Workers.map

    def stopping(workers: Workers, *arguments: object) -> Iterator[object]:
        for number, result in enumerate(receive(workers, *arguments)):
            yield result
            if number == 0:
                stop(*children())

    monkeypatch.setattr(Workers, "map", stopping)
    more: list[object] = ["--model", trained]
    if command == "finetune":
        more = ["--backbone=builtin", "--no-probe-first", "--epochs=9", "--cache=off"]
        more += ["--checkpoint-every=1", "--image-size=64", "--runs-dir", tmp_path / "runs"]
    outcome = cnnft(
        command, data, *more, "--workers=2", "--batch-size=2", "--read-timeout=0.3"
    )  # fmt: skip
    assert outcome.code == 1, outcome.err
    assert "error: nothing was read for 0.3 seconds of" in outcome.err and ".png" in outcome.err
    assert ("go on with: cnnft finetune --resume" in outcome.err) == (command == "finetune")


@pytest.mark.parametrize("command", ["finetune", "predict", "evaluate", "check"])
def test_a_command_whose_disk_does_not_answer(
    cnnft: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 4, first_seed=100)
    read, gone = Path.read_bytes, data / "bees" / "2.png"

    def hang(path: Path) -> bytes:
        if path == gone:
            time.sleep(4)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", hang)
    more = {"finetune": ["--backbone=builtin", "--runs-dir", tmp_path], "check": []}
    outcome = cnnft(
        command, data, *more.get(command, ["--model", trained]), "--workers=0", "--read-timeout=0.2"
    )
    outcome.fails_with(1, "nothing was read for 0.2 seconds", "--read-timeout")
    assert command == "predict" or str(gone) in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm")
def test_in_a_container_with_little_shared_memory_and_few_files(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 40)
    mounted = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && ulimit -n 40 && exec "$@"'
    done = subprocess.run(
        [
            *("unshare", "-m", "sh", "-c", mounted, "sh", sys.executable, "-m", "cnnft"),
            *("finetune", data, "--backbone=builtin", "--no-probe-first", "--epochs=1"),
            *("--workers=4", "--runs-dir", tmp_path / "runs"),
        ],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("of 4 workers: this process may have too few open files") == 1
