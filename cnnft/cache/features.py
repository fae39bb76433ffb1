"""Features at a cut, computed once for each image and view, and kept for later runs."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft import __version__
from cnnft.cache import store
from cnnft.data.dataset import Samples
from cnnft.data.images import decoder_versions
from cnnft.data.loading import Images, Loading, TrainingImages, Views, training_batches
from cnnft.data.sampler import IGNORED, Key, KeyedBatches
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import CnnftError
from cnnft.inference.predict import require_numbers
from cnnft.machine import distributed
from cnnft.machine.devices import float32_at_least
from cnnft.machine.files import to_safetensors, write_whole
from cnnft.machine.memory import available
from cnnft.models.freezing import changing
from cnnft.models.identity import Identity
from cnnft.models.surgery.cut import Cut
from cnnft.models.surgery.fold import folded
from cnnft.models.surgery.trace import example

MEMORY_SHARE = 0.3
"""Of the free memory may be filled with activations, beside the half that decoded images may."""
KEEP_EVERY = 60.0
"""Seconds after which what was computed meanwhile is written to the disk."""

_FORMAT = 2
_NAME = 16  # bytes that name an image
_FILE = 10**8  # bytes, about

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureExtractor:
    """The part of a network before a cut."""

    network: nn.Module
    cut: Cut
    named: str
    """What tells it from others: the hash of its weights, and what is not in them."""
    about: str
    """For those who look into the cache."""
    pooled: bool = False
    """Whether maps and tokens are averaged, so that there are only channels."""

    @classmethod
    def before(
        cls,
        cut: Cut,
        network: nn.Module,
        size: int,
        *,
        identity: Identity,
        weights: str,
        about: str,
        pooled: bool = False,
    ) -> "FeatureExtractor":
        """That part of `network`, for images of size × size; `weights` is its `backbone_hash`."""
        versions = [version(name) for name in ("torch", "torchvision", "timm")]
        built = (identity.library, identity.architecture, identity.model_args)
        device = next(network.parameters()).device
        named = repr((__version__, versions, weights, built, device.type))
        return cls(folded(network, size, changing(network)), cut, named, about, pooled)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> activations (B, ...), float32 or more, on the CPU.

        Raises:
            NotANumberError: they are NaN.
        """
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            pixels = pixels.to(device, non_blocking=True)
            values = float32_at_least(self.cut.activations(self.network.eval(), pixels))
            if self.pooled and values.ndim > 2:
                values = values.mean(dim=(2, 3) if values.ndim == 4 else 1)
        return require_numbers(values.cpu())


@dataclass(frozen=True)
class ViewSet:
    """Ways to look at images."""

    how: object
    """All that the pixels depend on besides what `rows` say; its `repr` tells it from others."""
    rows: Sequence[object]
    """What the pixels of each look depend on, such as the hash of a file and a view's number."""
    pixels: Callable[[Sequence[int]], Iterable[Tensor]]
    """Some of the rows -> what the network sees of them, in batches (B, 3, H, W)."""


def evaluation_view_set(
    samples: Samples, spec: InputSpec, images: Images, loading: Loading
) -> ViewSet:
    """As evaluation sees them; `images` are what `evaluation_crop` makes of the samples."""
    how = ("evaluation", spec, decoder_versions())
    dataset = TrainingImages(samples, EvaluationViews(spec).normalize, 0, images)

    def pixels(some: Sequence[int]) -> Iterator[Tensor]:
        return in_batches(dataset, [(0, index) for index in some], loading)

    return ViewSet(how, samples.hashes, pixels)


def in_batches(dataset: TrainingImages, keys: Sequence[Key], loading: Loading) -> Iterator[Tensor]:
    """(B, 3, H, W) of all keys, in order."""
    size = loading.batch_size
    batches = [list(keys[start : start + size]) for start in range(0, len(keys), size)]
    loading = loading if len(batches) > 1 else replace(loading, workers=0)
    for pixels, _ in training_batches(dataset, batches, loading):
        yield pixels


class Features:
    """What a frozen network makes of each look: read from the disk, or computed."""

    def __init__(self, frozen: FeatureExtractor, looks: ViewSet, on_disk: bool) -> None:
        self.frozen, self.looks, self.on_disk = frozen, looks, on_disk
        what = (_FORMAT, frozen.named, frozen.cut.first, frozen.pooled, looks.how)
        self._key = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        self._names = [_name(row) for row in looks.rows]
        self._values, self.missing = distributed.broadcast_from_main(self._read)

    def compute(self) -> Iterator[int]:
        """Yields how many of the missing are done; each process computes its share."""
        share = distributed.shard(len(self.missing))
        mine, done, kept = self.missing[share.start : share.stop], 0, 0
        written = time.monotonic()
        for pixels in self.looks.pixels(mine) if mine else ():
            rows = mine[done : done + len(pixels)]
            self._fill(rows, self.frozen(pixels))
            done += len(rows)
            if time.monotonic() - written > KEEP_EVERY:  # so that an interruption loses little
                left = len(self.missing) - kept * distributed.world_size
                kept = kept if self._keep(mine[kept:done], left) else done
                written = time.monotonic()
            yield min(done * distributed.world_size, len(self.missing))
        if distributed.world_size > 1:
            parts = [] if self._values is None else [(mine, self._values[mine])]
            for rows, values in distributed.gather(parts):
                self._fill(rows, values)
        distributed.broadcast_from_main(self._keep_rest)

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
        """What the disk has, in the rows of all, (N, ...), and the rows that it does not have."""
        rows: dict[bytes, list[int]] = {}  # images of the same content have the same name
        for row, name in enumerate(self._names):
            rows.setdefault(name, []).append(row)
        values: Tensor | None = None
        for names, found in _stored(self._key, rows.keys()) if self.on_disk else ():
            if values is None:
                values = torch.empty(len(self._names), *found.shape[1:])
            for name, value in zip(names, found, strict=False):
                for row in rows.pop(name, ()):
                    values[row] = value
        return values, sorted(row for some in rows.values() for row in some)

    def _keep_rest(self) -> None:
        """Those of the missing that this machine's disk does not have by now."""
        missing = {self._names[row] for row in self.missing}
        for names, _ in _stored(self._key, missing) if missing and self.on_disk else ():
            missing -= set(names)
        rows = [row for row in self.missing if self._names[row] in missing]
        reason = self._keep(rows, len(rows))
        if reason is not None:
            _log.info("features are not kept for later runs: %s", reason)

    def _keep(self, rows: Sequence[int], left: int) -> str | None:
        """Write them to the disk; or why not, such as that it has no room for all that are left."""
        if not self.on_disk or not rows:
            return None
        each = self.values[0].nbytes
        if reason := store.refusal(left * each):
            return reason
        try:
            with store.writing(len(rows) * each, wait=False) as alone:
                if not alone:
                    return "another process is writing to the cache"
                size = max(_FILE // each, 1)
                for start in range(0, len(rows), size):  # of each part there are copies
                    part = rows[start : start + size]
                    names = [self._names[row] for row in part]
                    _write(self._key, names, self.values[part], self.frozen.about)
        except CnnftError as error:
            return str(error)
        return None


def fits(frozen: FeatureExtractor, size: int, count: int) -> bool:
    """Whether memory has room for what becomes of `count` images of size × size."""
    needed = count * frozen(example(frozen.network, size))[0].nbytes
    copies = 1 if distributed.world_size == 1 else 3  # which processes that exchange them make
    return copies * needed <= MEMORY_SHARE * available(torch.device("cpu"))


def _name(image: object) -> bytes:
    return hashlib.blake2b(repr(image).encode(), digest_size=_NAME).digest()


def _folder() -> Path:
    return store.root() / "features"


def _stored(key: str, wanted: Set[bytes]) -> Iterator[tuple[list[bytes], Tensor]]:
    """(names, values) of each file that has any that is wanted; a damaged file has none."""
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


def _write(key: str, names: Sequence[bytes], values: Tensor, about: str) -> None:
    joined = b"".join(names)
    tensors = {"names": torch.frombuffer(bytearray(joined), dtype=torch.uint8).reshape(-1, _NAME)}
    path = _folder() / f"{key}-{hashlib.sha256(joined).hexdigest()[:16]}.safetensors"
    write_whole(path, to_safetensors(tensors | {"values": values}, {"about": about}))


def kept_batches(
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
    """Features (N, ...) as `inference.infer` takes them: this process's share, in order."""

    values: Tensor
    batch_size: int

    def __iter__(self) -> Iterator[Views]:
        share = distributed.shard(len(self.values))
        for start in range(share.start, share.stop, self.batch_size):
            indices = range(start, min(start + self.batch_size, share.stop))
            yield Views(list(indices), self.values[indices.start : indices.stop, None], {})
