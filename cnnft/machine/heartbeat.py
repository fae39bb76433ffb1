"""Several processes notice when one of them stands still, is dead, or cannot be reached.

Who waits for such a process waits within a collective, in C++, where no handler of Python runs;
and a limit on that wait would end those that wait for one that works long alone. So a thread of
each process writes a beat into torchrun's store, and looks whether the others' beats go on.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from cnnft.errors import CnnftError, first_line
from cnnft.machine.rendezvous import ARRIVAL, meet

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT = 2.0  # seconds
LIMIT = 60.0
"""Seconds without a beat after which a process is taken for dead."""
STOPPING_LIMIT = 8.0
"""The same once this process has been told to stop: nobody waits for a minute then."""

told_to_stop = threading.Event()
"""Set while a signal asks this process to end."""

_TO_SPEAK = 2.0  # seconds
_LEFT = -1
"""The beat of a process that has done its part."""
_AGAIN = "start torchrun again (a training goes on with --resume RUN)"

_log = logging.getLogger(__name__)


def end_process(sentence: str | None) -> None:
    """Say why, and end this process with its children, whatever its other threads wait for."""
    if sentence:
        speaking = threading.Thread(target=_log.error, args=("%s", sentence), daemon=True)
        speaking.start()
        speaking.join(_TO_SPEAK)  # what it writes to may stand still as well
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    os._exit(1)


class Heartbeat:
    """The beat of this process, and what becomes of the others'.

    Time is counted in own beats, not by a clock: while this process is stopped, or the machine
    sleeps, none of the others loses any.

    Args:
        connect: opens torchrun's store.
        end: called in a thread when the process cannot go on, with the sentence that says why;
            without one in all but the first process of each machine.
    """

    def __init__(
        self,
        connect: "Callable[[], Store]",
        rank: int,
        world_size: int,
        *,
        end: Callable[[str | None], None] = end_process,
        beat: float = BEAT,
        limits: tuple[float, float] = (LIMIT, STOPPING_LIMIT),
    ) -> None:
        self._rank, self._end, self._beat, self._limits = rank, end, beat, limits
        self._ranks = range(world_size)
        self._met: Future[Store] = Future()
        self._ending, self._done = threading.Event(), False
        self._answers = 0
        self._hosts: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(connect,), daemon=True)
        self._thread.start()

    def meet(self) -> "Store":
        """A store of the processes of this start, when all have come.

        Raises:
            CnnftError: not all come in time, or torchrun's store cannot be reached.
        """
        try:
            return self._met.result(2 * ARRIVAL)  # a limit for connecting and one for meeting
        except (TimeoutError, RuntimeError, ValueError) as error:
            raise _unreachable(first_line(error)) from error

    def leave(self, *, done: bool) -> None:
        """The beat ends. Where this process has not `done` its part, the others will notice."""
        self._done = done
        self._ending.set()
        self._thread.join(self._beat)

    def _run(self, connect: "Callable[[], Store]") -> None:
        try:
            store, self._hosts = meet(connect(), self._rank, len(self._ranks))
            own = store.clone()  # one connection carries one request at a time
        except Exception as error:
            self._met.set_exception(error)
            return
        threading.Thread(target=self._watch_the_store, daemon=True).start()
        self._met.set_result(store)
        try:
            self._exchange(own)
        except RuntimeError:
            if not self._ending.is_set():
                self._give_up(str(_unreachable("the connection broke")))

    @property
    def _limit(self) -> float:
        return self._limits[told_to_stop.is_set()]

    def _exchange(self, store: "Store") -> None:
        keys = [f"beat/{rank}" for rank in self._ranks]
        last = [store.add(key, 0) for key in keys]
        missed = [0] * len(keys)
        while not self._ending.wait(self._beat):
            store.add(keys[self._rank], 1)
            beats = [int(value) for value in store.multi_get(keys)]
            self._answers += 1
            for rank in self._ranks:
                still = beats[rank] == last[rank] != _LEFT
                missed[rank] = missed[rank] + 1 if still else 0
            last = beats
            lost = [rank for rank in self._ranks if missed[rank] * self._beat >= self._limit]
            if lost:
                self._give_up(self._about(lost), lost)
                return
        if self._done:
            store.set(keys[self._rank], str(_LEFT))

    def _watch_the_store(self) -> None:
        """Requests of a store whose machine does not answer wait without end."""
        answers, missed = self._answers, 0
        while not self._ending.wait(self._beat):
            missed = missed + 1 if self._answers == answers else 0
            answers = self._answers
            if missed * self._beat >= self._limit:
                self._give_up(str(_unreachable(f"no answer for {self._limit:.0f} seconds")))

    def _about(self, lost: list[int]) -> str:
        who = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in lost)
        return (
            f"{who}: no sign of life for {self._limit:.0f} seconds, so it is stopped, dead or "
            f"cannot be reached; end it, and {_AGAIN}"
        )

    def _give_up(self, sentence: str, lost: Sequence[int] = ()) -> None:
        self._ending.set()  # for both threads
        here = self._hosts[self._rank]
        beside = [r for r in self._ranks if self._hosts[r] == here and r not in lost]
        self._end(sentence if self._rank == min(beside, default=self._rank) else None)


def _unreachable(reason: str) -> CnnftError:
    place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    error = CnnftError(
        f"torchrun's store at {place} cannot be reached ({reason}): its torchrun has ended or is "
        f"stopped, or the network is down; {_AGAIN}"
    )
    error.met_by_main = True
    return error
