"""Decoded images that every epoch reads: cached in memory, or in a memory-mapped file."""

import hashlib
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnnft.cache import store
from cnnft.cache.store import gigabytes
from cnnft.config.choices import Cache
from cnnft.config.pixels import InputConfig
from cnnft.data.images import (
    FULL,
    ImageError,
    PixelSpec,
    decode,
    decoder_versions,
    ignoring_oddities,
    read_bytes,
    size_of,
)
from cnnft.data.loading import ImageFiles
from cnnft.data.threads import in_threads
from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError
from cnnft.machine import distributed
from cnnft.machine.files import to_safetensors, whole_file
from cnnft.machine.memory import available

RESOLUTION = 2.0
"""Training reads images whose shorter side is this many times the network's input size
(docs/speed.md)."""
MEMORY_SHARE = 0.5
"""Of the free memory may be filled with pixels."""

_FORMAT = 3
_SAMPLED = 1000  # images whose sizes tell how much all of them take
_MARGIN = 1.05  # for the others
_UNDER_WAY = 32  # decoded images that wait to be written: a few large ones fill the memory
_SHARED_MEMORY = Path("/dev/shm")  # where Linux has what processes share; in containers 64 MB

_ELSEWHERE = "--cache {}: {}; auto finds another place, or goes without"

_log = logging.getLogger(__name__)


def training_pixels(config: InputConfig, spec: InputSpec) -> PixelSpec:
    """What training reads of an image."""
    if config.train_resolution == "full":
        return FULL
    if config.train_resolution == "auto":
        return PixelSpec(max(round(RESOLUTION * spec.size), spec.resize), config.decoder)
    return PixelSpec(config.train_resolution, config.decoder)


@dataclass(frozen=True)
class CacheProgress:
    """The event of images that were decoded, or whose features were computed, for the cache."""

    images: int
    """So far."""
    total: int
    doing: str = "decoding"


class CachedImages:
    """`images[index]` is that of `files`, bit for bit; what is not cached is decoded each time.

    Each content is cached once, in the order of the hashes: neither names nor their order matter.
    """

    def __init__(self, files: ImageFiles, hashes: Sequence[str], about: str) -> None:
        """`hashes`: SHA-256 of the files; `about` describes the images in `cnnft cache`."""
        self.files, self.about = files, about
        first = {digest: index for index, digest in reversed(list(enumerate(hashes)))}
        self.contents = [(digest, first[digest]) for digest in sorted(first)]
        """(SHA-256, index of the first such file)."""
        rows = {digest: row for row, (digest, _) in enumerate(self.contents)}
        self.rows = torch.tensor([rows[digest] for digest in hashes])
        self.cached: PixelArray | None = None

    def __getitem__(self, index: int) -> Image.Image:
        cached = None if self.cached is None else self.cached.image(int(self.rows[index]))
        return self.files[index] if cached is None else cached

    def decode(self, row: int) -> Image.Image:
        """The image of a content; for threads.

        Raises:
            ImageError: the file changed since it was hashed, or cannot be read.
        """
        digest, index = self.contents[row]
        path = self.files.paths[index]
        content = read_bytes(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ImageError(path, "is another file than before")
        return self.files.cropped(decode(path, content, self.files.pixels))

    def names(self, row: int) -> list[str]:
        """The file of a content."""
        return [str(self.files.paths[self.contents[row][1]])]

    def bytes(self) -> int:
        """About how many all of them take, by the headers of some."""
        if self.files.crop is not None:
            return 3 * self.files.crop.size**2 * len(self.contents)
        some = self.contents[:: -(-len(self.contents) // _SAMPLED)]
        paths = [self.files.paths[index] for _, index in some]
        with ignoring_oddities():
            sizes = list(in_threads(size_of, paths, self.files.read_timeout))
        reduced = [self.files.pixels.reduced(*size) for size in sizes]
        # Draft mode rounds up before the reduction does.
        sampled = sum(3 * (width + 1) * (height + 1) for width, height in reduced)
        return int(_MARGIN * sampled / len(some) * len(self.contents))

    @property
    def path(self) -> Path:
        """Of the entry in the disk cache; its name hashes all that the pixels depend on."""
        digests = [digest for digest, _ in self.contents]
        what = (_FORMAT, decoder_versions(), self.files.pixels, self.files.crop, digests)
        name = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        return store.root() / "pixels" / f"{name}.safetensors"


def cache_images(
    images: Sequence[CachedImages], cache: Cache, epochs: int
) -> Generator[CacheProgress]:
    """Decode the images once, into a cache where `cache` and the machine allow.

    auto: the disk, if an earlier run left them there; else memory, up to MEMORY_SHARE of what is
    free; else the disk; else none. A single epoch needs no cache. Processes on one machine share
    the disk cache. Closed before its end, it leaves only what is whole.

    Raises:
        CnnftError: a file changed since it was hashed; there is no room where `cache` says.
    """
    if cache == "off" or (cache == "auto" and epochs == 1):
        return
    with nullcontext() if cache == "ram" else distributed.main_rank_first():
        missing = [part for part in images if cache == "ram" or not _open(part)]
        if not missing:
            _log.info("images are read from the pixel cache (%s)", store.root())
            return
        try:
            yield from _decode_missing(missing, cache)
        except ImageError as error:
            raise CnnftError(f"{error}: the data changed meanwhile") from error
        except CnnftError as error:
            if cache != "auto":
                raise CnnftError(_ELSEWHERE.format(cache, error)) from error
            _log.warning("no pixel cache: %s", error)


def require_room(images: Sequence[CachedImages], cache: Cache) -> None:
    """Raises `CnnftError` where `cache` names a place that has no room for what it lacks."""
    if cache in ("ram", "disk"):
        missing = [part for part in images if cache == "ram" or not _open(part)]
        try:
            _place(cache, sum(part.bytes() for part in missing))
        except CnnftError as error:
            raise CnnftError(_ELSEWHERE.format(cache, error)) from error


def _decode_missing(images: Sequence[CachedImages], cache: Cache) -> Iterator[CacheProgress]:
    needed = [part.bytes() for part in images]
    place = _place(cache, sum(needed))
    total, before = sum(len(part.contents) for part in images), 0
    where = "in memory" if place == "ram" else f"in {store.root()}"
    _log.info("decoding %d images once: about %s %s", total, gigabytes(sum(needed)), where)
    with nullcontext() if place == "ram" else store.writing(sum(needed)):
        for part, room in zip(images, needed, strict=True):
            for count in _to_memory(part, room) if place == "ram" else _to_disk(part):
                yield CacheProgress(before + count, total)
            before += len(part.contents)


def _place(cache: Cache, needed: int) -> str:
    """ram or disk: where there is room for so many bytes.

    Raises:
        CnnftError: nowhere.
    """
    refusals = {"ram": _memory_refusal, "disk": store.refusal}
    # Of several processes on one machine each would fill a memory of its own.
    automatic = ("ram", "disk") if distributed.local_world_size == 1 else ("disk",)
    reasons: list[str] = []
    for place in automatic if cache == "auto" else (cache,):
        reason = refusals[place](needed)
        if reason is None:
            return place
        reasons.append(reason)
    raise CnnftError(
        f"the decoded images take about {gigabytes(needed)}, and {' and '.join(reasons)}"
    )


def _memory_refusal(needed: int) -> str | None:
    room = int(MEMORY_SHARE * available(torch.device("cpu")))
    if needed > room:
        return f"{MEMORY_SHARE:.0%} of the free memory is {gigabytes(room)}"
    if not _forks() and _SHARED_MEMORY.exists():
        room = shutil.disk_usage(_SHARED_MEMORY).free
        if needed > room:
            return f"{_SHARED_MEMORY} has room for {gigabytes(room)}"
    return None


def _forks() -> bool:
    """Whether the processes that load images inherit the memory of this one."""
    return multiprocessing.get_start_method() == "fork"


class PixelArray:
    """RGB images one after the other in one array of bytes."""

    def __init__(self, sizes: Tensor, pixels: Tensor, path: Path | None = None) -> None:
        """`sizes`: (N, 2), int64, width and height, 0 where an image had no room; `pixels`:
        (bytes,), uint8; `path`: of the entry whose file `pixels` is mapped from."""
        self.sizes, self.pixels, self.path = sizes, pixels, path
        self.ends = (3 * sizes.prod(dim=1)).cumsum(dim=0)

    def image(self, row: int) -> Image.Image | None:
        """A copy of it; None where it had no room."""
        width, height = self.sizes[row].tolist()
        end = int(self.ends[row])
        content = self.pixels[end - 3 * width * height : end].numpy()
        if not len(content):
            return None
        return Image.frombuffer("RGB", (width, height), content, "raw", "RGB", 0, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself; tensors reach it through shared memory."""
        if self.path is not None:
            return _mapped, (self.path, len(self.sizes))
        return PixelArray, (self.sizes, self.pixels)


def _decode_all(
    images: CachedImages, write: Callable[[bytes], bool]
) -> Generator[int, None, Tensor]:
    """Yields how many are decoded; returns the `sizes` of a `PixelArray`.

    `write` appends an image's pixels, and says whether there was room.
    """

    def decoded(row: int) -> tuple[tuple[int, int], bytes]:
        image = images.decode(row)
        return image.size, image.tobytes()

    rows = range(len(images.contents))
    sizes = torch.zeros(len(rows), 2, dtype=torch.int64)
    results = in_threads(
        decoded, rows, images.files.read_timeout, names=images.names, under_way=_UNDER_WAY
    )
    with ignoring_oddities():
        for row, (size, content) in enumerate(results):
            if write(content):
                sizes[row] = torch.tensor(size)
            yield row + 1
    return sizes


def _to_memory(images: CachedImages, room: int) -> Iterator[int]:
    """Fill `room` bytes of memory; what does not fit is left out."""
    pixels = torch.empty(room, dtype=torch.uint8)
    if not _forks():
        pixels.share_memory_()
    end = 0

    def write(content: bytes) -> bool:
        nonlocal end
        if end + len(content) > room:
            return False
        pixels.numpy()[end : end + len(content)] = np.frombuffer(content, dtype=np.uint8)
        end += len(content)
        return True

    images.cached = PixelArray((yield from _decode_all(images, write)), pixels)


def _to_disk(images: CachedImages) -> Iterator[int]:
    """The pixels first, then the entry: without it they do not count."""
    path = images.path
    with whole_file(store.pixel_file(path), 0o600) as file:
        sizes = yield from _decode_all(images, lambda content: bool(file.write(content)))
    with whole_file(path, 0o600) as file:
        file.write(to_safetensors({"sizes": sizes}, {"about": images.about}))
    images.cached = _mapped(path, len(sizes))


def _open(images: CachedImages) -> bool:
    """Whether the disk has them from an earlier run."""
    path = images.path
    images.cached = _mapped(path, len(images.contents))
    if images.cached is not None:
        store.mark_used(path)
    return images.cached is not None


def _mapped(path: Path, count: int) -> PixelArray | None:
    """The entry of `count` images; None where it is damaged, incomplete, or gone."""
    try:
        with safe_open(path, "pt") as file:
            sizes: Tensor = file.get_tensor("sizes")
        pixels = store.pixel_file(path)
        length = pixels.stat().st_size
        if sizes.shape != (count, 2) or sizes.dtype != torch.int64:
            return None
        # As products of floats, which do not wrap around; a side is what Pillow can count.
        largest = 3 * float(sizes.double().prod(dim=1).max())
        if int(sizes.min()) < 1 or int(sizes.max()) >= 2**31 or largest > length:
            return None
        array = PixelArray(
            sizes, torch.from_file(str(pixels), size=length, dtype=torch.uint8), path
        )
    except (OSError, RuntimeError, SafetensorError):
        return None
    return array if int(array.ends[-1]) == length else None
