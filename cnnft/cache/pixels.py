"""Pixels that every epoch reads, decoded once: kept in memory, or in a file mapped into it."""

import hashlib
import json
import logging
import math
import multiprocessing
import shutil
import zlib
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
    read_bytes,
    size_of,
)
from cnnft.data.loading import ImageFiles
from cnnft.data.reading import in_threads
from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError
from cnnft.machine import distributed
from cnnft.machine.files import whole_file
from cnnft.machine.memory import available

RESOLUTION = 2.0
"""Times the network's input size has the shorter side of what training reads: docs/speed.md."""
MEMORY_SHARE = 0.5
"""Of the free memory may be filled with pixels."""

_FORMAT = 2
_SAMPLED = 1000  # images whose sizes tell how much all of them take
_MARGIN = 1.05  # for the others
_UNDER_WAY = 32  # decoded images that wait to be kept: a few large ones fill the memory
_LONGEST = 10**18  # bytes of pixels: a header has room for such a number
_INDEX_BYTES = 32  # of an image, in the fields before the pixels
_SHARED_MEMORY = Path("/dev/shm")  # where Linux has what processes share; in containers 64 MB

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
    """The event of an image that was decoded, to be kept."""

    images: int
    """So far."""
    total: int
    doing: str = "decoding"


class CachedImages:
    """`images[index]` is that of `files`, bit for bit; what is not kept is decoded each time.

    Each content is kept once, in the order of the hashes: neither names nor their order matter.
    """

    def __init__(self, files: ImageFiles, hashes: Sequence[str], about: str) -> None:
        """`hashes`: SHA-256 of the files; `about` tells the user what is kept."""
        self.files, self.about = files, about
        first = {digest: index for index, digest in reversed(list(enumerate(hashes)))}
        self.contents = [(digest, first[digest]) for digest in sorted(first)]
        """(SHA-256, index of the first such file)."""
        rows = {digest: row for row, (digest, _) in enumerate(self.contents)}
        self.rows = torch.tensor([rows[digest] for digest in hashes])
        self.store: _Store | None = None

    def __getitem__(self, index: int) -> Image.Image:
        kept = None if self.store is None else self.store.image(int(self.rows[index]))
        return self.files[index] if kept is None else kept

    def decode(self, row: int) -> Image.Image:
        """What is to be kept of a content; for threads.

        Raises:
            ImageError: the file is another one by now, or cannot be read.
        """
        digest, index = self.contents[row]
        path = self.files.paths[index]
        content = read_bytes(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ImageError(path, "is another file than before")
        return self.files.cropped(decode(path, content, self.files.pixels))

    def bytes(self) -> int:
        """About how many all of them take, by the headers of some."""
        if self.files.crop is not None:
            return 3 * self.files.crop.size**2 * len(self.contents)
        some = self.contents[:: -(-len(self.contents) // _SAMPLED)]
        sizes = in_threads(size_of, [self.files.paths[index] for _, index in some])
        reduced = [self.files.pixels.reduced(*size) for size in sizes]
        # Draft mode rounds up before the reduction does.
        sampled = sum(3 * (width + 1) * (height + 1) for width, height in reduced)
        return int(_MARGIN * sampled / len(some) * len(self.contents))

    @property
    def path(self) -> Path:
        """Where the disk has it; the name says all that the pixels depend on."""
        digests = [digest for digest, _ in self.contents]
        what = (_FORMAT, decoder_versions(), self.files.pixels, self.files.crop, digests)
        name = hashlib.sha256(repr(what).encode()).hexdigest()[:32]
        return store.root() / "pixels" / f"{name}.safetensors"


def keep(images: Sequence[CachedImages], cache: Cache, epochs: int) -> Generator[CacheProgress]:
    """Decode the images, and keep them where `cache` and the machine allow.

    auto: where the disk has them from before; in memory, up to MEMORY_SHARE of it; else on the
    disk; else nowhere. A single epoch needs nothing kept. Processes on one machine share what the
    disk has. Closed before its end, it has kept nothing that is not whole.

    Raises:
        CnnftError: a file is another one by now; there is no room where `cache` says.
    """
    if cache == "off" or (cache == "auto" and epochs == 1):
        return
    with nullcontext() if cache == "ram" else distributed.main_rank_first():
        missing = [part for part in images if cache == "ram" or not _open_kept(part)]
        if not missing:
            _log.info("images are read from the pixel cache (%s)", store.root())
            return
        try:
            yield from _keep(missing, cache)
        except ImageError as error:
            raise CnnftError(f"{error}: the data changed meanwhile") from error
        except CnnftError as error:
            if cache != "auto":
                raise CnnftError(
                    f"--cache {cache}: {error}; auto finds another place, or goes without"
                ) from error
            _log.warning("no pixel cache: %s", error)


def _keep(images: Sequence[CachedImages], cache: Cache) -> Iterator[CacheProgress]:
    needed = [part.bytes() for part in images]
    place = _place(cache, sum(needed))
    total, before = sum(len(part.contents) for part in images), 0
    where = "in memory" if place == "ram" else f"in {store.root()}"
    _log.info("decoding %d images once: about %s %s", total, gigabytes(sum(needed)), where)
    with nullcontext() if place == "ram" else store.writing(sum(needed)):
        for part, room in zip(images, needed, strict=True):
            for count in _in_memory(part, room) if place == "ram" else _on_disk(part):
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


# ---------------------------------------------------------------- the pixels of many images


@dataclass(frozen=True)
class _Store:
    """Images one after the other."""

    ends: Tensor
    """(N,), int64: where in `pixels` each image ends."""
    checks: Tensor
    """(N,), int64: CRC-32 of each image's pixels."""
    sizes: Tensor
    """(N, 2), int64: width and height; 0 where the image is not kept."""
    pixels: Tensor
    """(bytes,), uint8."""
    path: Path | None = None
    """The file that `pixels` is mapped from."""

    def image(self, row: int) -> Image.Image | None:
        """A copy of it; None where it is not kept, or damaged."""
        width, height = self.sizes[row].tolist()
        end = int(self.ends[row])
        content = self.pixels[end - 3 * width * height : end].numpy()
        if not len(content) or zlib.crc32(content.data) != int(self.checks[row]):
            return None
        return Image.frombuffer("RGB", (width, height), content, "raw", "RGB", 0, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself; tensors reach it through shared memory."""
        if self.path is not None:
            return _mapped, (self.path, len(self.ends))
        return _Store, (self.ends, self.checks, self.sizes, self.pixels)

    def __post_init__(self) -> None:
        """Raises `ValueError`: a file may hold anything."""
        areas = 3 * self.sizes.prod(dim=1)
        if (
            {tensor.dtype for tensor in (self.ends, self.checks, self.sizes)} != {torch.int64}
            or (self.pixels.dtype, self.pixels.ndim) != (torch.uint8, 1)
            or not len(self.ends) == len(self.checks) == len(areas)
            or not torch.equal(self.ends, areas.cumsum(dim=0))
            or int(self.sizes.min()) < 0
            or int(self.ends[-1]) > len(self.pixels)
        ):
            raise ValueError("these are no pixels of images")


def _fill(
    images: CachedImages, write: Callable[[bytes], bool]
) -> Generator[int, None, tuple[Tensor, Tensor, Tensor]]:
    """Decode all; yields how many are done, returns `ends`, `checks` and `sizes`.

    `write` appends an image's pixels, and says whether it could.
    """

    def decoded(row: int) -> tuple[tuple[int, int], bytes, int]:
        image = images.decode(row)
        pixels = image.tobytes()
        return image.size, pixels, zlib.crc32(pixels)

    rows = range(len(images.contents))
    sizes, checks = torch.zeros(len(rows), 2).long(), torch.zeros(len(rows)).long()
    for row, (size, pixels, check) in enumerate(in_threads(decoded, rows, _UNDER_WAY)):
        if write(pixels):
            sizes[row], checks[row] = torch.tensor(size), check
        yield row + 1
    return (3 * sizes.prod(dim=1)).cumsum(dim=0), checks, sizes


def _in_memory(images: CachedImages, room: int) -> Iterator[int]:
    """`images.store` is then in memory, of `room` bytes at most: what does not fit is left out."""
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

    images.store = _Store(*(yield from _fill(images, write)), pixels)


def _on_disk(images: CachedImages) -> Iterator[int]:
    """`images.store` is then a file of safetensors' layout; it appears when it is whole."""
    count, path = len(images.contents), images.path
    reserved = -(-len(_header(images.about, count, _LONGEST)) // 8) * 8
    with whole_file(path, 0o600) as file:
        file.seek(8 + reserved + _INDEX_BYTES * count)
        index = yield from _fill(images, lambda content: bool(file.write(content)))
        header = _header(images.about, count, int(index[0][-1])).ljust(reserved)
        file.seek(0)
        file.write(reserved.to_bytes(8, "little") + header)
        file.writelines(tensor.numpy().tobytes() for tensor in index)
    images.store = _mapped(path, count)


def _header(about: str, count: int, size: int) -> bytes:
    """Names the fields of a `_Store` of `count` images and `size` bytes of pixels."""
    fields = {"ends": [count], "checks": [count], "sizes": [count, 2], "pixels": [size]}
    entries: dict[str, Any] = {"__metadata__": {"about": about}}
    start = 0
    for name, shape in fields.items():
        end = start + math.prod(shape) * (1 if name == "pixels" else 8)
        dtype = "U8" if name == "pixels" else "I64"
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    return json.dumps(entries).encode()


def _open_kept(images: CachedImages) -> bool:
    """Take what the disk has from before, if it is whole."""
    path = images.path
    images.store = _mapped(path, len(images.contents)) if path.exists() else None
    if images.store is not None:
        store.mark_used(path)
    return images.store is not None


def _mapped(path: Path, count: int) -> _Store | None:
    """The file's `count` images; None where it is damaged, or gone."""
    try:
        with safe_open(path, "pt") as file:
            store = _Store(
                **{name: file.get_tensor(name) for name in file.offset_keys()}, path=path
            )
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError):
        return None
    return store if len(store.ends) == count else None
