"""Python objects over a socket; the tensors in them travel as bytes, behind the pickle."""

import pickle
import socket
import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("!Q")

_Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]
"""A tensor's dtype, shape and stride: all of it but its numbers."""


class _Pickler(pickle.Pickler):
    """Puts down layouts, and keeps the tensors, densely in memory in the order they have there."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> _Layout | None:
        if not isinstance(value, Tensor):
            return None
        dense = torch.empty_like(value)
        dense = value if dense.stride() == value.stride() else dense.copy_(value)
        self.tensors.append(dense)
        return dense.dtype, dense.shape, dense.stride()


class _Unpickler(pickle.Unpickler):
    """Reads each tensor where it finds a layout."""

    def __init__(self, content: bytearray, source: socket.socket, pinned: bool) -> None:
        super().__init__(BytesIO(content))
        self.source, self.pinned = source, pinned

    def persistent_load(self, layout: _Layout) -> Tensor:
        dtype, shape, stride = layout
        tensor = torch.empty_strided(shape, stride, dtype=dtype, pin_memory=self.pinned)
        _exactly(self.source, _bytes_of(tensor))
        return tensor


def send(write: Callable[[memoryview], int], message: object) -> None:
    """A pickle of `message`, behind which its tensors follow as they lie in memory.

    `write` returns how many bytes it took, as `socket.send` does.
    """
    content = BytesIO()
    pickler = _Pickler(content)
    pickler.dump(message)
    start = memoryview(_LENGTH.pack(content.tell()) + content.getvalue())
    for part in (start, *map(_bytes_of, pickler.tensors)):
        left = part
        while left:
            left = left[write(left) :]


def receive(source: socket.socket, pinned: bool = False) -> Any:
    """Raises `EOFError` where the other side has ended."""
    (length,) = _LENGTH.unpack(_exactly(source, bytearray(_LENGTH.size)))
    return _Unpickler(_exactly(source, bytearray(length)), source, pinned).load()


def _bytes_of(dense: Tensor) -> memoryview:
    flat = dense.as_strided((dense.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _exactly(source: socket.socket, room: Any) -> Any:
    """`room`, filled."""
    left = memoryview(room)
    while left:
        try:
            count = source.recv_into(left)
        except TimeoutError:  # of a `settimeout`
            continue
        if not count:
            raise EOFError
        left = left[count:]
    return room
