"""How a command ends at a signal: SIGINT (Ctrl-C), SIGTERM, SIGHUP.

A signal raises `Interrupted` in the main thread wherever it is, also while it waits; what is under
way unwinds and cleans up. Where that would leave state half changed, as within a training step, it
is `deferred`: only noted. Such code waits in between, for images say; then nothing is half changed,
and a signal acts at once again (`waiting`).

A thread sees to it that the process ends whatever the main thread does: at a second signal, and
`PATIENCE` after the first one where nothing happens.

Commands install all this (`handled`). As a library cnnft leaves signals to its caller, and all of
it is a no-op.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from cnnft.machine import distributed, heartbeat

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

PATIENCE = 4.0
"""Seconds after a signal within which the main thread is to end."""
TOGETHER = 2.0
"""Seconds for which a process of several still waits after a signal: if its images come, all of
them end after the same step."""

_ONE_PRESS = 0.2  # seconds: who stops a group of processes may signal each of them twice
_TICK = 0.1  # seconds
_END = b"\0"  # no signal's number
_TO_SPEAK = 0.5  # seconds; standard error may be a pipe that nobody reads

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


_active: "_Interruption | None" = None


@contextmanager
def handled(say: Callable[[str], object], say_last: Callable[[str], object]) -> Iterator[None]:
    """A command runs within it. Both tell the user, from another thread, what a signal does.

    In a thread that is not the main one it does nothing, as Python's signals are the main one's.
    """
    global _active
    if threading.current_thread() is not threading.main_thread() or _active is not None:
        yield
        return
    _active = _Interruption(say, say_last)
    try:
        _active.begin()
        yield
    finally:
        _active.end()
        _active = None


def received() -> int | None:
    """The signal that came."""
    return None if _active is None else _active.number


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within it a signal is only noted, but for `waiting`; yields whether one has come."""
    here = _here()
    if here is None:
        yield lambda: False
        return
    here.deferred = True
    try:
        yield lambda: here.number is not None
        if here.number is not None:  # what it would have stopped is done
            here.number, here.too_late = None, True
    finally:
        here.deferred, here.since = False, time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Within it a signal raises `Interrupted`, also one that came before and was only noted."""
    here = _here()
    if here is None:
        yield
        return
    before, here.waiting = here.waiting, True
    if here.deferred:
        here.since = time.monotonic()
    try:
        here.act()
        yield
    finally:
        here.waiting = before


def forget() -> None:
    """In a process that was just forked: signals end it, as if nobody had handled them."""
    global _active
    signal.set_wakeup_fd(-1)  # else its signals would reach the parent
    if _active is not None:
        _active.close()
    _active = None
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came since the fork acts now


@contextmanager
def blocked() -> Iterator[None]:
    """Signals wait until its end, and in a process that is forked within it for `forget`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _here() -> "_Interruption | None":
    return _active if threading.current_thread() is threading.main_thread() else None


class _Interruption:
    """The signals of a command, and the thread that watches them."""

    def __init__(self, say: Callable[[str], object], say_last: Callable[[str], object]) -> None:
        """Raises `OSError` where no file is left."""
        self.say, self.say_last = say, say_last
        self.children = _children()
        self.number: int | None = None
        self.deferred = self.waiting = False
        self.too_late = False
        """What the signal was to stop is done: the thread is to forget it as well."""
        self.overdue = False
        """One process of several has waited for `TOGETHER`: it ends without the others."""
        self.since = 0.0
        """From when on the main thread might have acted."""
        self.resent = 0
        """How many signals the thread has sent, to wake the main one, and has not read back."""
        # What is ignored (nohup) stays so.
        self.before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) is not signal.SIG_IGN}
        self.reader, self.writer = socket.socketpair()

    def begin(self) -> None:
        self.writer.setblocking(False)
        self.thread = threading.Thread(target=self.watch, name="signals", daemon=True)
        with suppress(RuntimeError):  # no thread may be started: the handlers remain
            self.thread.start()
        self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        for number in self.before:
            signal.signal(number, self.handle)

    def end(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.fd_before)
        self.writer.send(_END)
        if self.thread.is_alive():
            self.thread.join(1)
        self.close()
        heartbeat.told_to_stop.clear()
        self.kill_children()  # for one that stands still multiprocessing would wait without end

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its instructions or instead of its waiting."""
        self.number = self.number or number
        self.act()

    def act(self) -> None:
        """Raises `Interrupted` where a signal has come and nothing forbids it."""
        alone = distributed.world_size == 1
        if self.number is not None and (
            not self.deferred or (self.waiting and (alone or self.overdue))
        ):
            raise Interrupted(self.number)

    def watch(self) -> None:
        first: tuple[int, float] | None = None
        while (came := self.receive(first is not None)) is not None:
            for number in came:
                now = time.monotonic()
                if self.resent:
                    self.resent -= 1
                elif first is None:
                    first = number, now
                    self.since = now
                    heartbeat.told_to_stop.set()
                    if self.deferred and not self.waiting:
                        with suppress(OSError):  # the terminal has gone
                            self.say("stopping after this step; once more to leave at once")
                elif now - first[1] > _ONE_PRESS:
                    self.leave(first[0])
            if self.too_late:
                first, self.too_late = None, False
                heartbeat.told_to_stop.clear()
            if first is None or (self.deferred and not self.waiting):
                continue
            if time.monotonic() - max(self.since, first[1]) > PATIENCE:
                self.leave(first[0])
            elif self.deferred and not self.overdue and time.monotonic() - first[1] > TOGETHER:
                self.overdue = True
                self.resent += 1
                signal.pthread_kill(threading.main_thread().ident or 0, first[0])

    def receive(self, soon: bool) -> list[int] | None:
        """Signals that came, and with `soon` an empty list after a while; None at the end."""
        self.reader.settimeout(_TICK if soon else None)
        try:
            came = self.reader.recv(64)
        except TimeoutError:
            return []
        return None if _END in came else [number for number in came if number in self.before]

    def leave(self, number: int) -> None:
        """End the process, whatever the others of its threads do."""
        self.kill_children()
        last = threading.Thread(target=self.say_last, args=("left at once",), daemon=True)
        last.start()
        last.join(_TO_SPEAK)
        os._exit(128 + number)

    def kill_children(self) -> None:
        for child in _children() - self.children:
            child.kill()


def _children() -> "set[BaseProcess]":
    """Those of multiprocessing."""
    loaded = sys.modules.get("multiprocessing")  # else there are none
    return set() if loaded is None else set(loaded.active_children())
