"""Reading in threads that nobody has to wait for: from a disk that is gone no read returns."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from cnnft.config.run import MachineConfig
from cnnft.errors import CnnftError
from cnnft.machine.interruption import waiting

READ_TIMEOUT = MachineConfig.read_timeout
"""Seconds."""

_UNDER_WAY = 256  # files: enough for every thread to have work while the first is waited for
_THREADS = min(32, (os.cpu_count() or 1) + 4)
_TICK = 1.0  # seconds
_TO_END = 1.0  # seconds, for threads whose results nobody wants any more
_SHOWN = 3  # files in a sentence

S = TypeVar("S")
T = TypeVar("T")


class ReadTimeoutError(CnnftError):
    """Images did not arrive in time."""

    def __init__(self, files: list[str], seconds: float) -> None:
        shown = ", ".join(files[:_SHOWN]) + (", …" if len(files) > _SHOWN else "")
        super().__init__(
            f"nothing was read for {seconds:g} seconds of {shown}: is its disk or network mount "
            "still there? --read-timeout allows more time"
        )


def within(seconds: float, get: Callable[[float], T], files: list[str]) -> T:
    """What `get(timeout)` returns, which raises `TimeoutError` or `queue.Empty` after `timeout`.

    Time in which this process is suspended does not count, and a signal is not kept waiting.

    Raises:
        ReadTimeoutError: nothing for so many seconds, for lack of these `files`.
    """
    left = seconds
    with waiting():
        while left > 0:
            try:
                return get(min(_TICK, left))
            except (TimeoutError, Empty):
                left -= _TICK
    raise ReadTimeoutError(files, seconds)


def in_threads(
    function: Callable[[S], T],
    files: Iterable[S],
    read_timeout: float = READ_TIMEOUT,
    *,
    names: Callable[[S], list[str]] = lambda file: [str(file)],
    under_way: int = _UNDER_WAY,
) -> Iterator[T]:
    """function(file) of each, in order. Threads suffice: Pillow decodes outside Python's lock.

    So many are `under_way` at a time: the names of all take less memory than what is made of them.
    `names` are for the message. Python's own executor would wait, at the latest at the end of the
    process, for a thread that hangs.

    Raises:
        ReadTimeoutError: one took longer than `read_timeout` from when it was needed.
    """
    pool, waited = _Threads(function, min(_THREADS, under_way)), deque[tuple[S, Future[T]]]()

    def result() -> T:
        file, future = waited.popleft()
        error = within(read_timeout, future.exception, names(file))
        if error is not None:
            raise error
        return future.result()

    try:
        for file in files:
            waited.append((file, pool.submit(file)))
            if len(waited) == under_way:
                yield result()
        while waited:
            yield result()
    finally:
        pool.end()


class _Threads(Generic[S, T]):
    """Daemon threads, at most `most`, that call a function."""

    def __init__(self, function: Callable[[S], T], most: int) -> None:
        self.function, self.most = function, most
        self.tasks: SimpleQueue[tuple[S, Future[T]] | None] = SimpleQueue()
        self.threads: list[Thread] = []

    def submit(self, argument: S) -> Future[T]:
        if len(self.threads) < self.most:
            self.start_one()
        future: Future[T] = Future()
        self.tasks.put((argument, future))
        return future

    def start_one(self) -> None:
        thread = Thread(target=self.work, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system allows no more
            if not self.threads:
                raise
            self.most = len(self.threads)
        else:
            self.threads.append(thread)

    def work(self) -> None:
        while (task := self.tasks.get()) is not None:
            argument, future = task
            try:
                future.set_result(self.function(argument))
            except BaseException as error:  # whoever waits for it raises it
                future.set_exception(error)
            del task, argument, future  # while it waits for the next one

    def end(self) -> None:
        """What nobody has begun is left; what hangs hangs on, and keeps no process alive."""
        with suppress(Empty):
            while True:
                self.tasks.get_nowait()
        for _ in self.threads:
            self.tasks.put(None)
        end = time.monotonic() + _TO_END
        for thread in self.threads:
            thread.join(max(end - time.monotonic(), 0))
