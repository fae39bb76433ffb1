"""Signals: where they raise, where they are noted, that the process ends whatever it does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest

from cnnft.cache import store
from cnnft.data.threads import ReadTimeoutError, in_threads, within
from cnnft.machine import interruption
from cnnft.machine.interruption import Interrupted, deferred, handled, received, waiting

if sys.platform == "win32":
    pytest.skip("signals are sent as on Unix", allow_module_level=True)

import fcntl  # Windows has none

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int = signal.SIGTERM, after: float = 0.0) -> None:
    if after:
        threading.Timer(after, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)


def silent(text: str) -> None:
    pass


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_also_in_a_wait_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    start = time.monotonic()
    with pytest.raises(Interrupted) as raised, handled(silent, silent):
        send(number, after=0.1)
        within(60, lambda seconds: SimpleQueue[int]().get(timeout=seconds), [])
    assert raised.value.number == number and time.monotonic() - start < 5
    assert signal.getsignal(number) == before and received() is None
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_what_is_deferred_is_noted_and_raises_at_the_next_wait() -> None:
    said: list[str] = []
    with pytest.raises(Interrupted), handled(said.append, silent), deferred() as interrupted:
        assert not interrupted()
        send()
        assert interrupted() and received() == signal.SIGTERM
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        with waiting():
            pytest.fail("it waits")
    assert said == ["stopping after this step; once more to leave at once"]


def test_who_waits_for_the_cache_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNFT_CACHE", str(tmp_path))
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process does
        with pytest.raises(Interrupted), handled(silent, silent), deferred():
            send(after=0.2)
            with store.writing(0):
                pytest.fail("the lock is held")


def test_a_signal_that_came_too_late_stops_nothing() -> None:
    with handled(silent, silent):
        with deferred():
            send()
        with waiting():
            assert received() is None


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(silent, silent):
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_leaves_signals_alone() -> None:
    with deferred() as interrupted, pytest.raises(KeyboardInterrupt), waiting():
        send(signal.SIGINT)
    assert not interrupted()


def test_in_another_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with handled(silent, silent), deferred(), waiting():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_where_no_file_is_left_nothing_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr("socket.socketpair", refuse)
        with handled(silent, silent):
            pytest.fail("it runs")
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted), handled(silent, silent):  # again
        send()


STUBBORN = """
import multiprocessing, sys, time
from cnnft.machine import interruption
interruption.PATIENCE = float(sys.argv[2])
def say(text):
    print(text, flush=True)
with interruption.handled(say, say):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
    child.start()
    def work():
        first = True
        while True:
            try:
                if first:
                    print(child.pid, flush=True)
                first = False
                time.sleep(100)
            except KeyboardInterrupt:
                pass
    if sys.argv[1] == "deferred":
        with interruption.deferred():
            work()
    work()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    ("state", "patience", "signals"), [("deferred", 60, 2), ("not", 60, 2), ("not", 0.3, 1)]
)
def test_the_process_ends_whatever_it_does(state: str, patience: float, signals: int) -> None:
    command = [sys.executable, "-c", STUBBORN, state, str(patience)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(2 * interruption._ONE_PRESS)
        assert process.wait(5) == 128 + signal.SIGTERM
        assert process.stdout.read().endswith("left at once\n")
    with pytest.raises(ProcessLookupError):
        for _ in range(500):
            os.kill(child, 0)
            time.sleep(0.01)


def test_two_signals_at_once_count_as_one() -> None:
    with pytest.raises(Interrupted), handled(silent, silent), deferred():
        send()
        send()
        time.sleep(0.1)  # else the process would have ended
        with waiting():
            pass


# ---------------------------------------------------------------- threads that read


@pytest.fixture
def hang() -> "Callable[[str], str]":
    """Reads all files but one, which never answers."""
    released = threading.Event()

    def read(file: str) -> str:
        if file == "gone":
            released.wait(30)
        return file

    yield read
    released.set()


@pytest.mark.parametrize("under_way", [1, 256])
def test_a_read_that_does_not_return_is_named(hang: Callable[[str], str], under_way: int) -> None:
    results, start = (
        in_threads(hang, ["a", "gone", "b"], 0.2, under_way=under_way),
        time.monotonic(),
    )
    assert next(results) == "a"
    with pytest.raises(ReadTimeoutError, match=r"0\.2 seconds of gone.*--read-timeout"):
        next(results)
    assert time.monotonic() - start < 5


def test_errors_of_threads_reach_who_waits() -> None:
    def fail(file: str) -> None:
        raise TimeoutError("of the function")

    with pytest.raises(TimeoutError, match="of the function"):
        list(
            in_threads(lambda file: (_ for _ in ()).throw(TimeoutError("of the function")), [1], 9)
        )


def test_a_read_that_hangs_keeps_no_process_alive() -> None:
    code = """
import threading
from cnnft.data.threads import in_threads
try:
    list(in_threads(lambda file: threading.Event().wait(), ["gone"], 0.1))
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert "of gone" in done.stdout and done.returncode == 0, done


def test_time_in_which_the_process_stands_still_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def late(seconds: float) -> str:
        asked.append(seconds)
        time.sleep(0.05)  # for a laptop that was closed, longer than `seconds`
        if len(asked) < 3:
            raise TimeoutError
        return "there"

    monkeypatch.setattr("cnnft.data.threads._TICK", 0.01)
    assert within(0.1, late, []) == "there" and asked == [0.01] * 3
