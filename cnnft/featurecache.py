"""Activations at a cut, computed once for each image and view, and kept for later runs."""

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft import cachefolder, distributed
from cnnft.batches import IGNORED, KeyedBatches, Views
from cnnft.cutting import Cut
from cnnft.errors import CnnftError
from cnnft.files import to_safetensors, write_whole
from cnnft.memory import available

MEMORY_SHARE = 0.15
"""Of the free memory may be filled with activations; while they are made there are copies."""

_FORMAT = 1
_NAME = 16  # bytes that name an image

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """The part of a network before a cut."""

    network: nn.Module
    cut: Cut
    weights: str
    """What tells it from others: a hash, and what is not in it."""
    about: str
    """For those who look into the cache."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> activations (B, ...), float32, on the CPU."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            pixels = pixels.to(device, non_blocking=True)
            return self.cut.activations(self.network.eval(), pixels).float().cpu()


@dataclass(frozen=True)
class Looks:
    """Ways to look at images."""

    how: object
    """All that the pixels depend on besides what `rows` say; its `repr` tells it from others."""
    rows: Sequence[object]
    """What the pixels of each look depend on, such as the hash of a file and a view's number."""
    pixels: Callable[[Sequence[int]], Iterable[Tensor]]
    """Some of the rows -> what the network sees of them, in batches (B, 3, H, W)."""


class Activations:
    """What a frozen network makes of each look: read from the disk, or computed."""

    def __init__(self, frozen: Frozen, looks: Looks, on_disk: bool) -> None:
        self.frozen, self.looks, self.on_disk = frozen, looks, on_disk
        what = (_FORMAT, frozen.weights, frozen.cut.first, looks.how)
        self._key = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        self._names = [_name(row) for row in looks.rows]
        wanted = frozenset(self._names) if on_disk else frozenset()
        self._known = distributed.by_main(lambda: _read(self._key, wanted))
        self.missing = [row for row, name in enumerate(self._names) if name not in self._known]

    def compute(self) -> Generator[int, None, Tensor]:
        """Yields how many of the missing are done; returns all, (N, ...), and keeps the new ones.

        Each process computes its share.
        """
        share = distributed.share(len(self.missing))
        mine, parts, done = self.missing[share.start : share.stop], [], 0
        for pixels in self.looks.pixels(mine) if mine else ():
            parts.append(self.frozen(pixels).clone())
            done += len(pixels)
            yield min(done * distributed.world, len(self.missing))
        parts = distributed.gather(parts)
        new = torch.cat(parts) if parts else torch.empty(0)
        if parts and self.on_disk:
            names = [self._names[row] for row in self.missing]
            distributed.by_main(lambda: _write(self._key, names, new, self.frozen.about))
        shape = (new if parts else next(iter(self._known.values()))[None]).shape[1:]
        values = torch.empty(len(self._names), *shape)
        for row, name in enumerate(self._names):
            if name in self._known:
                values[row] = self._known[name]
        values[self.missing] = new.reshape(len(self.missing), *shape)
        return values


def fits(frozen: Frozen, example: Tensor, count: int) -> bool:
    """Whether memory has room for as many activations as the one of `example` (B, 3, H, W)."""
    needed = count * frozen(example)[0].nbytes
    return needed <= MEMORY_SHARE * available(torch.device("cpu"))


def _name(image: object) -> bytes:
    return hashlib.blake2b(repr(image).encode(), digest_size=_NAME).digest()


def _folder() -> Path:
    return cachefolder.root() / "features"


def _read(key: str, wanted: frozenset[bytes]) -> dict[bytes, Tensor]:
    """What the disk has of it; a damaged file has nothing."""
    found: dict[bytes, Tensor] = {}
    for path in sorted(_folder().glob(f"{key}-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = [bytes(name) for name in file.get_tensor("names").numpy()]
                if wanted.isdisjoint(names):
                    continue
                values = file.get_tensor("values")
            # Copies: whoever keeps a row would keep, and send, all of them.
            pairs = zip(names, values, strict=True)
            found |= {name: value.clone() for name, value in pairs if name in wanted}
            cachefolder.mark_used(path)
        except (OSError, SafetensorError, ValueError, TypeError):
            continue
    return found


def _write(key: str, names: Sequence[bytes], values: Tensor, about: str) -> None:
    joined = b"".join(names)
    tensors = {"names": torch.frombuffer(bytearray(joined), dtype=torch.uint8).reshape(-1, _NAME)}
    path = _folder() / f"{key}-{hashlib.sha256(joined).hexdigest()[:16]}.safetensors"
    reason = cachefolder.refusal(values.nbytes)
    if reason is not None:
        _log.info("features are not kept for later runs: %s", reason)
        return
    try:
        with cachefolder.writing(values.nbytes):
            write_whole(path, to_safetensors(tensors | {"values": values}, {"about": about}))
    except CnnftError as error:
        _log.warning("features are not kept for later runs: %s", error)


def training_batches(
    values: Tensor, labels: Tensor, keys: KeyedBatches
) -> Iterator[tuple[Tensor, Tensor]]:
    """`values` (K, N, ...) of K views, `labels` (N,) -> (activations (B, ...), labels (B,)) for all
    epochs.
    """
    for batch in keys:
        indices = torch.tensor([max(index, ~index) for _, index, *_ in batch])
        views = torch.tensor([view for view, *_ in batch])
        counted = torch.tensor([index >= 0 for _, index, *_ in batch])
        yield values[views, indices], labels[indices].where(counted, IGNORED)


@dataclass(frozen=True)
class ViewBatches:
    """Activations (N, ...) as `inference.infer` takes them: this process's share, in order."""

    values: Tensor
    batch_size: int

    def __iter__(self) -> Iterator[Views]:
        share = distributed.share(len(self.values))
        for start in range(share.start, share.stop, self.batch_size):
            indices = range(start, min(start + self.batch_size, share.stop))
            yield Views(list(indices), self.values[indices.start : indices.stop, None], {})
