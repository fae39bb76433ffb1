"""Give up on a download when nothing arrives any more, and never on a slow one.

The hub libraries time out in their own ways: torch.hub never does, huggingface_hub retries for
almost a minute. Neither offers one limit that holds from the last byte received, so the bytes are
counted where all of them pass: at Python's sockets.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import constants

from cnnft.errors import CnnftError

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds without a byte after which a download has failed."""


class DownloadError(CnnftError):
    """The hub cannot be reached, or it stopped answering."""


def patiently(download: Callable[[], T], patience: float = PATIENCE) -> T:
    """Return `download()`; where no byte arrives for `patience` seconds, raise `DownloadError`.

    The library's own exceptions pass through. After giving up, the download's thread is left to
    itself: it is a daemon, so it cannot keep the process alive.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(download())
        except BaseException as error:
            failure.append(error)

    with _watch_sockets() as last_byte:
        thread = threading.Thread(target=run, daemon=True, name="cnnft-download")
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if time.monotonic() - last_byte() > patience and thread.is_alive():
                raise DownloadError(f"nothing was received for {patience:.0f} seconds")
    if failure:
        raise failure[0]
    return outcome[0]


@contextmanager
def _watch_sockets() -> Iterator[Callable[[], float]]:
    """Gives a function that tells when (time.monotonic) this process last received a byte."""
    latest = time.monotonic()

    def watched(receive: Callable[..., Any]) -> Callable[..., Any]:
        def receive_and_note(*args: Any, **kwargs: Any) -> Any:
            nonlocal latest
            received = receive(*args, **kwargs)
            if received:
                latest = time.monotonic()
            return received

        return receive_and_note

    # hf_xet downloads in Rust, past Python's sockets; without it the hub falls back to HTTP.
    xet = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    originals = [
        (owner, name, getattr(owner, name))
        for owner in (socket.socket, ssl.SSLSocket)
        for name in ("recv", "recv_into")
    ]
    for owner, name, receive in originals:
        setattr(owner, name, watched(receive))
    try:
        yield lambda: latest
    finally:
        for owner, name, receive in originals:
            setattr(owner, name, receive)
        constants.HF_HUB_DISABLE_XET = xet
