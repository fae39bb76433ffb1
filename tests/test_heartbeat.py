"""Processes that come late, stand still, end or leave: rendezvous and heartbeat on real stores."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
from torch.distributed import TCPStore

from cnnft.errors import CnnftError
from cnnft.machine import heartbeat
from cnnft.machine.heartbeat import Heartbeat
from cnnft.machine.rendezvous import meet

BEAT, LIMIT = 0.1, 1.0
can_stop = pytest.mark.skipif(sys.platform == "win32", reason="signals that stop a process")


def serve() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def connect(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, wait_for_workers=False)


class Rank:
    """A heartbeat, and what it said when it would have ended the process."""

    def __init__(self, port: int, rank: int, limit: float = LIMIT) -> None:
        self.said: list[str | None] = []
        self.heart = Heartbeat(
            lambda: connect(port), rank, 2, end=self.said.append, beat=BEAT, limits=(limit, LIMIT)
        )

    def has_ended(self) -> bool:
        return bool(self.said)


@contextmanager
def forked(function: Callable[..., None], *arguments: object) -> Iterator[int]:
    """The process id of one that calls the function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    assert process.pid
    try:
        yield process.pid
    finally:
        process.kill()  # also while it is stopped
        process.join(10)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(BEAT)
    return holds()


def second(port: int) -> None:
    """Rank 1, whose main thread is busy."""
    Rank(port, 1)
    time.sleep(60)


@can_stop
def test_a_process_that_is_stopped_is_named_and_one_that_is_busy_is_not() -> None:
    store = serve()
    with forked(second, store.port) as pid:
        first = Rank(store.port, 0)
        first.heart.meet()
        assert not within(1.5 * LIMIT, first.has_ended)
        os.kill(pid, signal.SIGSTOP)
        assert within(10 * LIMIT, first.has_ended)
    assert first.said[0] is not None
    assert first.said[0].startswith(f"rank 1 on {socket.gethostname()}: no sign of life for 1 sec")


@can_stop
def test_who_is_told_to_stop_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "told_to_stop", threading.Event())
    store = serve()
    with forked(second, store.port) as pid:
        first = Rank(store.port, 0, limit=1000 * LIMIT)
        first.heart.meet()
        os.kill(pid, signal.SIGSTOP)
        assert not within(1.5 * LIMIT, first.has_ended)
        heartbeat.told_to_stop.set()
        assert within(10 * LIMIT, first.has_ended)


def test_who_has_done_its_part_may_leave_and_who_has_not_is_missed() -> None:
    store = serve()
    for done in (True, False):
        ranks = [Rank(store.port, rank) for rank in (0, 1)]
        for rank in ranks:
            rank.heart.meet()
        ranks[1].heart.leave(done=done)
        missed = within(1.5 * LIMIT if done else 10 * LIMIT, ranks[0].has_ended)
        assert missed is not done and not ranks[1].said
        ranks[0].heart.leave(done=True)


def both(port: int, pipe: Connection) -> None:
    ranks = [Rank(port, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.heart.meet()
    pipe.send("met")
    time.sleep(2 * LIMIT)
    pipe.send([said for rank in ranks for said in rank.said])


@can_stop
def test_processes_that_sleep_together_miss_nobody() -> None:
    store = serve()
    ours, theirs = multiprocessing.Pipe()
    with forked(both, store.port, theirs) as pid:
        assert ours.recv() == "met"
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5 * LIMIT)
        os.kill(pid, signal.SIGCONT)
        assert ours.recv() == []


def host(pipe: Connection) -> None:
    store = serve()
    pipe.send(store.port)
    time.sleep(60)


@can_stop
@pytest.mark.parametrize(
    ("name", "words"), [("SIGSTOP", "no answer"), ("SIGKILL", "connection broke")]
)
def test_a_store_that_is_gone_ends_all_and_one_says_so(name: str, words: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with forked(host, theirs) as pid:
        port = ours.recv()
        ranks = [Rank(port, rank) for rank in (0, 1)]
        for rank in ranks:
            rank.heart.meet()
        os.kill(pid, getattr(signal, name))
        assert within(10 * LIMIT, lambda: all(rank.said for rank in ranks))
    assert ranks[0].said[0] is not None and words in ranks[0].said[0]
    assert ranks[1].said == [None]


def test_who_is_started_again_meets_those_of_its_start_alone() -> None:
    store = serve()
    for start in range(3):
        with ThreadPoolExecutor() as pool:
            one = pool.submit(meet, connect(store.port), 1, 2)
            time.sleep(0.3)  # the store still has what those before have left
            assert not one.done()
            zero = pool.submit(meet, connect(store.port), 0, 2)
            (a, hosts), (b, _) = zero.result(10), one.result(10)
        assert hosts == [socket.gethostname()] * 2
        assert a.add("count", 1) + b.add("count", 1) == 1 + 2, start


def test_who_does_not_come_is_named() -> None:
    store = serve()
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(meet, connect(store.port), rank, 3, 1.0) for rank in (0, 2)]
        with pytest.raises(CnnftError, match="within 1 seconds: rank 1 did not come; end all"):
            ranks[0].result()
        with pytest.raises(CnnftError, match="not all came"):
            ranks[1].result()
