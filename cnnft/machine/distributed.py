"""What torchrun gives: processes that train one network together. Alone, all of it is a no-op.

torchrun starts every process with RANK, WORLD_SIZE and the address of process 0 in its environment.
Small things travel over gloo, gradients on GPUs over NCCL.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cnnft.errors import CnnftError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

_launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
rank = int(os.environ["RANK"]) if _launched else 0
world_size = int(os.environ["WORLD_SIZE"]) if _launched else 1
local_rank = int(os.environ.get("LOCAL_RANK", 0)) if _launched else 0
"""Which of the machine's devices is this process's."""
local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _launched else 1
"""Processes on this machine."""
is_main = rank == 0
"""The one that writes and speaks."""

finished = True
"""Set to False before a process ends that has not done its part: the others are to notice. One
that stops as all do has done it: the main process still saves."""

_main_works_alone = False
"""Whether this is the main process within `broadcast_from_main`."""


def launch() -> str:
    """Names this call of torchrun, restarts of its processes included; empty without torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # LAUNCH/attempt_0/0/error.json
    return str(Path(file).parents[2]) if _launched and len(Path(file).parents) > 3 else ""


@contextmanager
def _results_aside() -> Iterator[None]:
    """Within it, standard output is standard error: torch 2.9's gloo greets there, from C++."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(results, 1)
        os.close(results)


def _dist() -> Any:
    """torch.distributed, where all processes have met."""
    _require_all()
    from torch import distributed as dist

    if not dist.is_initialized():
        _join(dist)
    return dist


def _join(dist: Any) -> None:
    """Meet the other processes, and watch from then on that none of them stands still."""
    from datetime import timedelta

    import torch

    from cnnft.machine.heartbeat import Heartbeat
    from cnnft.machine.rendezvous import ARRIVAL

    def connect() -> Any:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
        return store

    heartbeat = Heartbeat(connect, rank, world_size)
    store = heartbeat.meet()
    with _results_aside():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            # One of them may work long alone; the heartbeat ends the wait for one that does not.
            timeout=timedelta(days=1),
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=world_size,
        )

    def leave() -> None:
        dist.destroy_process_group()
        heartbeat.leave(done=finished and not hasattr(sys, "last_value"))

    atexit.register(leave)


def _require_all() -> None:
    """Raises `RuntimeError` in what the main process alone does, where the others wait for it."""
    if _main_works_alone:
        raise RuntimeError("a collective within broadcast_from_main: no other process enters it")


def shard(count: int) -> range:
    """Which of `count` things are this process's: a contiguous part, in the order of ranks.

    Where they are fewer than the processes, the main one has some.
    """
    if _launched and world_size > 1:
        _dist()  # before each works on its own for long
    return range(-(-rank * count // world_size), -(-(rank + 1) * count // world_size))


def gather(values: list[T]) -> list[T]:
    """The lists of all processes, one after the other in the order of ranks."""
    if world_size == 1:
        return values
    lists: list[list[T]] = [[] for _ in range(world_size)]
    _dist().all_gather_object(lists, values)
    return [value for part in lists for value in part]


def broadcast_from_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, which alone calls it, or the error it raises.

    Raises:
        RuntimeError: `function` calls for the other processes, also where there are none.
    """
    global _main_works_alone
    _require_all()
    box: list[Any] = [None, None]
    raised: CnnftError | None = None
    if world_size > 1:
        _dist()  # before the others wait for long
    if is_main:
        _main_works_alone = True
        try:
            box[0] = function()
        except CnnftError as error:
            raised, box[1] = error, (str(error), error.exit_code)
        finally:
            _main_works_alone = False
    if world_size > 1:
        _dist().broadcast_object_list(box, src=0)
    if box[1] is not None:
        sentence, code = box[1]  # not every error can be pickled
        kind = UsageError if code == UsageError.exit_code else CnnftError
        shared = raised or kind(sentence)
        shared.met_by_main = True
        raise shared
    return box[0]


@contextmanager
def main_rank_first() -> Iterator[None]:
    """One process of each machine does it, then the others, for whom its files are there."""
    if world_size == 1:
        yield
        return
    dist = _dist()  # before the others wait for long
    if local_rank:
        dist.barrier()
    try:
        yield
    finally:
        if not local_rank:
            dist.barrier()


def all_reduce_sum(values: "Tensor") -> "Tensor":
    """The sum over all processes."""
    if world_size == 1:
        return values
    summed = values.clone()
    _dist().all_reduce(summed)
    return summed


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is up in any process."""
    if world_size == 1:
        return flags
    import torch

    return tuple(
        count > 0 for count in all_reduce_sum(torch.tensor(flags, dtype=torch.int32)).tolist()
    )


def data_parallel(network: "nn.Module", device: "torch.device") -> "nn.Module":
    """`network`, or a wrapper whose backward pass averages gradients over the processes.

    The processes start from the main one's weights.
    """
    if world_size == 1:
        return network
    from torch.nn.parallel import DistributedDataParallel

    _dist()
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def no_sync(network: "nn.Module") -> AbstractContextManager[None]:
    """Within it, a `data_parallel` network's backward passes add to this process's gradients."""
    if world_size == 1:
        return nullcontext()
    return network.no_sync()  # type: ignore[operator]


def broadcast_buffers(network: "nn.Module") -> None:
    """The main process's buffers everywhere, so that all evaluate the same network."""
    if world_size == 1:
        return
    for buffer in network.buffers():
        _dist().broadcast(buffer, src=0)
