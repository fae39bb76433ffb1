"""What torchrun gives: processes that train one network together. Alone, all of it is a no-op.

torchrun starts every process with RANK, WORLD_SIZE and the address of process 0 in its environment.
Small things travel over gloo, gradients on GPUs over NCCL.
"""

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

_launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
rank = int(os.environ["RANK"]) if _launched else 0
world = int(os.environ["WORLD_SIZE"]) if _launched else 1
local_rank = int(os.environ.get("LOCAL_RANK", 0)) if _launched else 0
"""Which of the machine's devices is this process's."""
is_main = rank == 0
"""The one that writes and speaks."""
restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
"""torchrun started all processes again, because one had died."""


def launch() -> str:
    """Names this call of torchrun, restarts included (asked of the main process)."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.getppid()}"


def join() -> None:
    """Meet the other processes; waits until all are there."""
    import torch
    from torch import distributed as dist

    if world == 1 or dist.is_initialized():
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)


def says_first(text: str) -> bool:
    """Whether no other process has asked this of `text`: a mistake that all meet is told once."""
    if world == 1 or not os.environ.get("TORCHELASTIC_RUN_ID"):
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # the store is torchrun's own
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"cnnft said {attempt} {text}", 1) == 1
    except RuntimeError:
        return True


def share(count: int) -> range:
    """Which of `count` things are this process's: a contiguous part, in the order of ranks."""
    return range(rank * count // world, (rank + 1) * count // world)


def gather(values: list[T]) -> list[T]:
    """The lists of all processes, one after the other in the order of ranks."""
    if world == 1:
        return values
    from torch import distributed as dist

    lists: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def from_main(value: T) -> T:
    """What the main process has as `value`."""
    if world == 1:
        return value
    from torch import distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: "Tensor") -> "Tensor":
    """The sum over all processes."""
    if world == 1:
        return values
    from torch import distributed as dist

    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def anywhere(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is up in any process."""
    if world == 1:
        return flags
    import torch

    return tuple(count > 0 for count in total(torch.tensor(flags, dtype=torch.int32)).tolist())


def parallel(network: "nn.Module", device: "torch.device") -> "nn.Module":
    """`network`, or a wrapper whose backward pass averages gradients over the processes.

    The processes start from the main one's weights.
    """
    if world == 1:
        return network
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def without_sync(network: "nn.Module") -> AbstractContextManager[None]:
    """Within it, backward passes of a `parallel` network add to this process's gradients only."""
    if world == 1:
        return nullcontext()
    return network.no_sync()  # type: ignore[operator]


def share_statistics(network: "nn.Module") -> None:
    """The main process's buffers everywhere, so that all evaluate the same network."""
    if world == 1:
        return
    from torch import distributed as dist

    for buffer in network.buffers():
        dist.broadcast(buffer, src=0)
