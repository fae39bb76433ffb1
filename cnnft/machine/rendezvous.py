"""How the processes of one start meet in torchrun's store, which outlives them."""

import json
import socket
import time
from typing import TYPE_CHECKING
from uuid import uuid4

from cnnft.errors import CnnftError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

ARRIVAL = 300.0
"""Seconds within which all come: until then each has read the command line, and imported torch."""

_POLL = 0.1  # seconds


def meet(
    store: "Store", rank: int, world_size: int, arrival: float = ARRIVAL
) -> tuple["Store", list[str]]:
    """A store for the processes of this start alone, and the host of each.

    torchrun starts processes again with the same store. Each machine's torchrun counts its
    restarts by itself, so the count does not tell those of now from those before. So rank 0 names
    the start, each signs under that name, and rank 0 publishes the signatures: who finds its own
    among them has met the others.

    Raises:
        CnnftError: not all of them come within `arrival` seconds.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    signature = [socket.gethostname(), uuid4().hex]
    if rank == 0:
        store.set("start", uuid4().hex)
    for _ in range(round(arrival / _POLL)):  # not by a clock: this process may be stopped as well
        if store.check(["start"]):
            ours = PrefixStore(store.get("start").decode(), store)
            all_signed = _sign(ours, rank, world_size, signature)
            if all_signed and all_signed[rank] == signature:
                return ours, [host for host, _ in all_signed]
        time.sleep(_POLL)
    missing = "not all came"
    if rank == 0:
        lost = [str(r) for r in range(world_size) if not ours.check([_arrived(r)])]
        missing = f"rank {', '.join(lost)} did not come"
    error = CnnftError(
        f"the {world_size} processes that torchrun started have not met within "
        f"{arrival:.0f} seconds: {missing}; end all of them and start torchrun again"
    )
    error.met_by_main = True
    raise error


def _sign(
    ours: "Store", rank: int, world_size: int, signature: list[str]
) -> list[list[str]] | None:
    """Everybody's signature, once all have signed."""
    ours.set(_arrived(rank), json.dumps(signature))
    keys = [_arrived(r) for r in range(world_size)]
    if rank == 0 and ours.check(keys):
        ours.set("all", json.dumps([json.loads(value) for value in ours.multi_get(keys)]))
    return json.loads(ours.get("all")) if ours.check(["all"]) else None


def _arrived(rank: int) -> str:
    return f"arrived/{rank}"
