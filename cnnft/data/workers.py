"""Worker processes that load batches: no wait for them is without a limit.

torch's `DataLoader` hands tensors over through /dev/shm, of which containers have 64 MB, with file
descriptors that are fetched from the worker, and through a queue whose locks all workers share: a
worker that stands still stops the others, and its `timeout` sees neither. Here each worker has a
socket of its own, which carries the bytes of its batches.
"""

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import cycle, islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import torch

from cnnft.data.threads import within
from cnnft.errors import CnnftError, first_line
from cnnft.machine import interruption
from cnnft.machine.messages import receive, send

PREFETCHED = 2
"""Batches of each worker that are computed or wait."""
FILES = 3
"""Open files that each takes in its parent: a socket, and two of multiprocessing's."""

_TICK = 1.0  # seconds
_TO_DIE = 1.0  # seconds
_BEFORE_BLAME = 0.5  # seconds, in which the signal that ended a worker may reach this process
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl.h

K = TypeVar("K")
B = TypeVar("B")

_log = logging.getLogger(__name__)


class WorkerError(CnnftError):
    """A worker process ended."""


class Workers(Generic[K, B]):
    """Processes that compute `fetch(key)`; they end with this object, or with their parent."""

    def __init__(self, fetch: Callable[[K], B], count: int, pinned: bool) -> None:
        """`pinned`: tensors come in page-locked memory.

        Raises:
            OSError: the system allows none.
        """
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end_all, self._workers, os.getpid())
        for _ in range(count):
            try:
                self._workers.append(_Worker(fetch, pinned))
            except (OSError, RuntimeError) as error:  # too many files, processes or threads
                if not self._workers:
                    raise
                _warn_once(
                    f"{len(self._workers)} of {count} workers could be started "
                    f"({first_line(error)})"
                )
                break

    @property
    def alive(self) -> bool:
        return bool(self._end.alive)

    def end(self) -> None:
        self._end()

    def map(
        self, keys: Iterable[K], read_timeout: float, names: Callable[[K], list[str]]
    ) -> Iterator[B]:
        """fetch(key) of each, in order. Left before its end, it ends the workers.

        Raises:
            ReadTimeoutError: for `read_timeout` seconds from when it was needed nothing came, or a
                worker did not even take its next key; the message has the `names` of what it is at.
            WorkerError: one died.
        """
        pairs = zip(cycle(self._workers), keys)
        under_way: deque[tuple[_Worker, K]] = deque()

        def submit(some: Iterable[tuple[_Worker, K]]) -> None:
            for worker, key in some:
                computed = next((first for busy, first in under_way if busy is worker), key)
                worker.submit(key, read_timeout, names(computed))
                under_way.append((worker, key))

        try:
            submit(islice(pairs, PREFETCHED * len(self._workers)))
            while under_way:
                worker, key = under_way.popleft()
                batch = worker.result(read_timeout, names(key))
                submit(islice(pairs, 1))
                yield batch
        except BaseException:  # GeneratorExit too: it is left before its end
            self.end()
            raise


class _Worker:
    """A process, its socket, and the thread that takes what it sends."""

    def __init__(self, fetch: Callable[[Any], Any], pinned: bool) -> None:
        self.socket, theirs = socket.socketpair()
        _ours.add(self.socket)
        self.results: SimpleQueue[Any] = SimpleQueue()
        self.process = multiprocessing.Process(target=_serve, args=(theirs, fetch), daemon=True)
        try:
            with interruption.blocked():
                self.process.start()
            self.socket.settimeout(_TICK)
            self.thread = Thread(target=self.take, args=(pinned,), daemon=True)
            self.thread.start()
        except BaseException:
            self.socket.close()
            if self.process.pid is not None:
                self.process.kill()
            raise
        finally:
            theirs.close()

    def submit(self, key: object, seconds: float, files: list[str]) -> None:
        """Waits where it has not read what was submitted before: it computes of `files`."""
        with suppress(OSError):  # it has died, as `result` will say
            send(lambda part: within(seconds, lambda _: self.socket.send(part), files), key)

    def result(self, seconds: float, files: list[str]) -> Any:
        result = within(seconds, lambda some: self.results.get(timeout=some), files)
        if isinstance(result, _Ended):
            self.explain_death()
        if isinstance(result, _Failed):
            raise result.error
        return result

    def explain_death(self) -> None:
        with interruption.waiting():  # who stops a group of processes may reach the worker first
            time.sleep(_BEFORE_BLAME)
        self.process.join(_TO_DIE)
        code = self.process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        raise WorkerError(
            f"a process that loads images died ({how}), most often for lack of memory: lower "
            "--workers, or 0 for none"
        )

    def take(self, pinned: bool) -> None:
        """In a thread: all that the process sends."""
        try:
            while True:
                self.results.put(receive(self.socket, pinned))
        except (EOFError, OSError):
            self.results.put(_Ended())
        except Exception as error:  # such as no memory
            self.results.put(_Failed(error))


class _Ended:
    """No more comes."""


class _Failed:
    """An exception on its way from a worker."""

    def __init__(self, error: Exception) -> None:
        self.error = error


_ours: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
"""Ends of sockets that a forked process inherits, and would keep open."""


def _end_all(workers: list[_Worker], parent: int) -> None:
    """SIGKILL, which reaches one that stands still too: they hold nothing but their batches."""
    if os.getpid() != parent:  # inherited by a worker
        return
    for worker in workers:
        worker.process.kill()
    until = time.monotonic() + _TO_DIE
    for worker in workers:
        worker.process.join(max(until - time.monotonic(), 0))
        if worker.process.exitcode is None:
            # The system cannot end it (a read from a dead disk). Multiprocessing would wait for it.
            multiprocessing.process._children.discard(worker.process)  # type: ignore[attr-defined]
        worker.thread.join(max(until - time.monotonic(), 0))
        worker.socket.close()
    workers.clear()


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


# ---------------------------------------------------------------- in the worker


def _serve(own: socket.socket, fetch: Callable[[Any], Any]) -> None:
    """What a worker process does until its parent has gone."""
    _end_with_parent()
    interruption.forget()
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C and torchrun signal whole groups: the parent decides what follows
    for inherited in list(_ours):
        inherited.close()
    torch.set_num_threads(1)  # others did not survive the fork
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            key = receive(own)
            try:
                result = fetch(key)
            except Exception as error:
                result = _Failed(_portable(error))
            send(own.send, result)
            del key, result  # while it waits for the next one


def _end_with_parent() -> None:
    """SIGKILL when it ends, also for one that stands still; elsewhere its socket ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _portable(error: Exception) -> Exception:
    """`error` with its traceback as a note, or another one where it cannot be pickled."""
    if isinstance(error, CnnftError):
        return CnnftError(str(error))
    error.add_note("in a process that loads images:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
