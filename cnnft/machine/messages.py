"""Python objects over a socket; the tensors in them travel as bytes, beside the pickle."""

import pickle
import socket
import struct
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

_LENGTHS = struct.Struct("!Q")


class _Pickler(pickle.Pickler):
    """Sets tensors aside, densely in memory in the order that they have there."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        dense = torch.empty_like(value)
        self.tensors.append(value if dense.stride() == value.stride() else dense.copy_(value))
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: list[Tensor]) -> None:
        super().__init__(BytesIO(content))
        self.persistent_load = tensors.__getitem__  # type: ignore[method-assign]


def send(to: socket.socket, message: object, attempt: Callable[[Callable[[], int]], int]) -> None:
    """A pickle of `message`, whose tensors follow as they lie in memory."""
    head = BytesIO()
    pickler = _Pickler(head)
    pickler.dump(message)
    layouts = pickle.dumps([(t.dtype, t.shape, t.stride()) for t in pickler.tensors])
    lengths = _LENGTHS.pack(len(layouts)) + _LENGTHS.pack(head.tell())
    start = memoryview(lengths + layouts + head.getvalue())
    for part in (start, *map(_bytes_of, pickler.tensors)):
        left = part
        while left:
            left = left[attempt(partial(to.send, left)) :]


def receive(source: socket.socket, pinned: bool = False) -> Any:
    """Raises `EOFError` where the other side has ended."""
    lengths = _exactly(source, bytearray(2 * _LENGTHS.size))
    layouts, head = (
        bytes(_exactly(source, bytearray(size))) for (size,) in _LENGTHS.iter_unpack(lengths)
    )
    tensors: list[Tensor] = []
    for dtype, shape, stride in pickle.loads(layouts):
        tensors.append(torch.empty_strided(shape, stride, dtype=dtype, pin_memory=pinned))
        _exactly(source, _bytes_of(tensors[-1]))
    return _Unpickler(head, tensors).load()


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
