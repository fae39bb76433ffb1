"""Features at a cut: computed once for each image and view, and cached for later runs.

Weights are bit-identical whatever the workers and wherever pixels are cached. Features agree to
rounding (1e-7) with those computed at another batch size or number of threads: libraries add in
another order.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import tee
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft import __version__
from cnnft.cache import store
from cnnft.cache.views import PixelsOf, ViewSet
from cnnft.data.loading import Views
from cnnft.data.sampler import IGNORED, Key
from cnnft.errors import CnnftError
from cnnft.inference.predict import require_numbers
from cnnft.machine import distributed
from cnnft.machine.devices import float32_at_least
from cnnft.machine.files import to_safetensors, write_whole
from cnnft.machine.memory import available
from cnnft.models.identity import Identity
from cnnft.models.surgery.cut import Cut
from cnnft.models.surgery.embed import pooled
from cnnft.models.surgery.fold import folded
from cnnft.models.surgery.stagehead import head_stages
from cnnft.models.surgery.trace import example

MEMORY_SHARE = 0.3
"""Of the free memory may be filled with features, beside the half that decoded images may."""
SAVE_EVERY = 60.0
"""Seconds after which new features are written to the disk, so that an interruption loses few."""

_FORMAT = 4
_NAME_BYTES = 16  # of the hash that names a view
_SHARD_BYTES = 10**8  # about

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureExtractor:
    """The part of a network before a cut: pixels -> features."""

    network: nn.Module
    cut: Cut
    identity: Identity
    weights: str
    """The `backbone_hash` of the network."""
    pooled: bool = False
    """Whether maps and tokens are averaged: features are (B, D)."""
    rounding: tuple[int, int] | None = None
    """(batch size, threads), for what magnifies last digits, such as a probe: features computed
    with others are not read."""

    def folded(self, size: int, after: Collection[str]) -> "FeatureExtractor":
        """The same with BatchNorm folded into convolutions, for images of size × size pixels.

        `after`: names of tensors after the cut: a layer before it must not do for one of those.
        """
        return replace(self, network=folded(self.network, size, after))

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, ...), float32 or more, on the CPU.

        Raises:
            NotANumberError: they are NaN.
        """
        with torch.inference_mode():
            pixels = pixels.to(self.device, non_blocking=True)
            values = float32_at_least(self.cut.activations(self.network.eval(), pixels))
            values = pooled(values) if self.pooled else values
        return require_numbers(values.cpu())

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def feature_key(extractor: FeatureExtractor, transform: object) -> str:
    """Hash of all that the features of a data set have in common: the one place that says it.

    `transform` is that of the `ViewSet`, whose names tell one image and view from another. Neither
    the names of files nor their order change a feature, or its key.
    """
    identity = extractor.identity
    versions = [__version__, *(version(name) for name in ("torch", "torchvision", "timm"))]
    built = (identity.library, identity.architecture, sorted(identity.model_args.items()))
    place = (extractor.cut.first, head_stages(extractor.network), extractor.pooled)
    network = (extractor.weights, built, place)
    computed = (versions, extractor.device.type, extractor.rounding)
    return hashlib.sha256(repr((_FORMAT, network, computed, transform)).encode()).hexdigest()[:32]


class Features:
    """What a feature extractor makes of each view: read from the disk, or computed.

    On the disk they lie in shards, files of some of them: images and views are added without
    writing the others again, and each shard is whole.
    """

    def __init__(self, extractor: FeatureExtractor, views: ViewSet, on_disk: bool) -> None:
        self.extractor, self.views, self.on_disk = extractor, views, on_disk
        self._key = feature_key(extractor, views.transform)
        self._names = [_hashed(name) for name in views.names]
        self._values: Tensor | None = None
        self._values, self.missing = distributed.broadcast_from_main(self._read)

    def compute(self, pixels_of: PixelsOf | None = None) -> Iterator[int]:
        """Yields how many of the missing are done; each process computes its shard of them.

        `pixels_of`: instead of the views' own `batches`.
        """
        pixels_of = pixels_of or self.views.batches
        batches = self._missing_batches()
        shard = distributed.shard(len(batches))
        mine = [row for batch in batches[shard.start : shard.stop] for row in batch]
        done, saved, written = 0, 0, time.monotonic()
        for pixels in pixels_of(mine) if mine else ():
            rows = mine[done : done + len(pixels)]
            self._fill(rows, self.extractor(pixels))
            done += len(rows)
            if time.monotonic() - written > SAVE_EVERY:
                left = len(self.missing) - saved * distributed.world_size
                if self._save(mine[saved:done], left) is None:
                    saved = done
                written = time.monotonic()
            yield min(done * distributed.world_size, len(self.missing))
        if distributed.world_size > 1:
            parts = [] if self._values is None else [(mine, self._values[mine])]
            for rows, values in distributed.gather(parts):
                self._fill(rows, values)
        distributed.broadcast_from_main(self._save_rest)

    def _missing_batches(self) -> list[list[int]]:
        """The missing rows, in the batches that they are in where all are missing.

        A feature's last digits depend on its batch. So they do not depend on what a kill left, nor
        on the number of processes. Images that are new among others share batches of their own.
        """
        size, rows = self.views.batch_size, len(self._names)
        batches: dict[int, list[int]] = {}
        for row in self.missing:
            batches.setdefault(row // size, []).append(row)
        whole = [rs for n, rs in batches.items() if len(rs) == min(size, rows - n * size)]
        others = sorted(set(self.missing) - {row for batch in whole for row in batch})
        return whole + [others[start : start + size] for start in range(0, len(others), size)]

    @property
    def values(self) -> Tensor:
        """(N, ...), of all, when they are computed."""
        assert self._values is not None
        return self._values

    def _fill(self, rows: list[int], values: Tensor) -> None:
        if self._values is None:
            self._values = torch.empty(len(self._names), *values.shape[1:])
        self._values[rows] = values

    def _read(self) -> tuple[Tensor | None, list[int]]:
        """The values (N, ...) with the rows that the disk has filled, and the rows it lacks."""
        rows: dict[bytes, list[int]] = {}  # views of the same content have the same name
        for row, name in enumerate(self._names):
            rows.setdefault(name, []).append(row)
        for names, found in _shards(self._key, rows.keys()) if self.on_disk else ():
            for name, value in zip(names, found, strict=False):
                for row in rows.pop(name, ()):
                    self._fill([row], value[None])
        return self._values, sorted(row for some in rows.values() for row in some)

    def _save_rest(self) -> None:
        """What this machine's disk still lacks: processes have saved while they computed."""
        lacking = {self._names[row] for row in self.missing}
        for names, _ in _shards(self._key, lacking) if lacking and self.on_disk else ():
            lacking -= set(names)
        rows = [row for row in self.missing if self._names[row] in lacking]
        reason = self._save(rows, len(rows))
        if reason is not None:
            _say_not_cached(reason)

    def _save(self, rows: Sequence[int], left: int) -> str | None:
        """Write them to the disk; or why not, such as that it has no room for all that are left."""
        if not self.on_disk or not rows:
            return None
        each = self.values[0].nbytes
        if reason := store.refusal(left * each):
            return reason
        try:
            with store.writing(len(rows) * each, wait=False) as locked:
                if not locked:
                    return "another process is writing to the cache"
                size = max(_SHARD_BYTES // each, 1)
                for start in range(0, len(rows), size):  # of each shard there are copies
                    self._write_shard(rows[start : start + size])
        except CnnftError as error:
            return str(error)
        return None

    def _write_shard(self, rows: Sequence[int]) -> None:
        joined = b"".join(self._names[row] for row in rows)
        names = torch.frombuffer(bytearray(joined), dtype=torch.uint8).reshape(-1, _NAME_BYTES)
        about = f"{self.extractor.identity.name}, {self.views.about}"
        content = to_safetensors({"names": names, "values": self.values[rows]}, {"about": about})
        path = _folder() / f"{self._key}-{hashlib.sha256(joined).hexdigest()[:16]}.safetensors"
        write_whole(path, content)


def compute_both(plain: Features, mirrored: Features) -> Iterator[int]:
    """Compute features of images, and of their mirror images; yields how many are done.

    Where those of the same images are missing, each is decoded once.
    """
    if plain.missing != mirrored.missing:
        yield from plain.compute()
        yield from (len(plain.missing) + done for done in mirrored.compute())
        return
    decoded: list[Iterator[Tensor]] = []

    def once(rows: Sequence[int]) -> Iterator[Tensor]:
        own, other = tee(plain.views.batches(rows))
        decoded.append(other)
        return own

    def again(rows: Sequence[int]) -> Iterator[Tensor]:
        return (pixels.flip(3) for pixels in decoded.pop())

    for counts in zip(plain.compute(once), mirrored.compute(again), strict=True):
        yield sum(counts)


@cache
def _say_not_cached(reason: str) -> None:
    """Once: a probe, training and validation images each have features."""
    _log.info("features are not cached for later runs: %s", reason)


def fits(extractor: FeatureExtractor, size: int, count: int) -> bool:
    """Whether memory has room for the features of `count` images of size × size pixels."""
    needed = count * extractor(example(extractor.network, size))[0].nbytes
    copies = 1 if distributed.world_size == 1 else 3  # which processes that exchange them make
    return copies * needed <= MEMORY_SHARE * available(torch.device("cpu"))


def _hashed(name: object) -> bytes:
    return hashlib.blake2b(repr(name).encode(), digest_size=_NAME_BYTES).digest()


def _folder() -> Path:
    return store.root() / "features"


def _shards(key: str, wanted: Set[bytes]) -> Iterator[tuple[list[bytes], Tensor]]:
    """(names, values) of each shard that has any that is wanted; damaged ones are skipped."""
    for path in sorted(_folder().glob(f"{key}-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = [bytes(name) for name in file.get_tensor("names").numpy()]
                if wanted.isdisjoint(names):
                    continue
                values = file.get_tensor("values")
        except (OSError, SafetensorError, ValueError, TypeError):
            continue
        store.mark_used(path)
        yield names, values


@dataclass(frozen=True)
class FeatureBatches:
    """Training batches of cached features: (features (B, ...), labels (B,)) of each key."""

    values: Tensor
    """(V, N, ...) of V views."""
    labels: Tensor
    """(N,)"""
    keys: Iterable[list[Key]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.keys:
            indices = torch.tensor([max(index, ~index) for _, index, *_ in batch])
            views = torch.tensor([view for view, *_ in batch])
            counted = torch.tensor([index >= 0 for _, index, *_ in batch])
            yield self.values[views, indices], self.labels[indices].where(counted, IGNORED)


@dataclass(frozen=True)
class ViewBatches:
    """Features (N, ...) as `predict_batches` takes them: this process's shard, in order."""

    values: Tensor
    batch_size: int

    def __iter__(self) -> Iterator[Views]:
        shard = distributed.shard(len(self.values))
        for start in range(shard.start, shard.stop, self.batch_size):
            indices = range(start, min(start + self.batch_size, shard.stop))
            yield Views(list(indices), self.values[indices.start : indices.stop, None], {})
