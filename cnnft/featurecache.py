"""Activations at a cut, computed once for each image and view, and kept for later runs."""

import hashlib
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft import cachefolder, distributed
from cnnft.batches import IGNORED, KeyedBatches, Views
from cnnft.cutting import Cut
from cnnft.errors import CnnftError
from cnnft.files import to_safetensors, write_whole
from cnnft.memory import available

MEMORY_SHARE = 0.5
"""Of the free memory may be filled with activations."""

_FORMAT = 1
_NAME = 16  # bytes that name an image

_log = logging.getLogger(__name__)

Pixels = Iterable[tuple[Sequence[int], Tensor]]
"""(which images, what the network sees of them (B, 3, H, W))."""


@dataclass(frozen=True)
class View:
    """One way to look at each of some images."""

    what: object
    """All that the pixels depend on besides the image; its `repr` tells it from others."""
    images: Sequence[object]
    """All that each image's pixels depend on, such as the hash of its file."""
    pixels: Callable[[Sequence[int]], Pixels]
    """Which images -> what the network sees of them."""


class Frozen(NamedTuple):
    """The part of a network before a cut."""

    network: nn.Module
    cut: Cut
    weights: str
    """Their hash."""
    about: str

    def shape(self, pixels: Tensor) -> tuple[int, ...]:
        """Of one image's activations."""
        with torch.inference_mode():
            return tuple(self.cut.activations(self.network.eval(), pixels).shape[1:])


def fits(frozen: Frozen, pixels: Tensor, count: int) -> bool:
    """Whether memory has room for `count` activations; `pixels` (1, 3, H, W) are an example."""
    needed = 4 * count * math.prod(frozen.shape(pixels))
    return needed <= MEMORY_SHARE * available(torch.device("cpu"))


def keep(frozen: Frozen, view: View, on_disk: bool) -> Generator[int, None, Tensor]:
    """Yields how many images are done; returns their activations (N, ...), float32, on the CPU.

    Those that the disk has are read from there; the others are computed, by each process its
    share, and written there.
    """
    names = [_name(image) for image in view.images]
    key = hashlib.sha256(
        repr((_FORMAT, frozen.weights, frozen.cut.first, view.what)).encode()
    ).hexdigest()[:32]
    folder = cachefolder.root() / "features"
    known = distributed.by_main(lambda: _read(folder, key)) if on_disk else {}
    missing = [index for index, name in enumerate(names) if name not in known]
    yield len(names) - len(missing)
    computed: list[Tensor] = []
    share = distributed.share(len(missing))
    for values in _compute(frozen, view, missing[share.start : share.stop]):
        computed += values
        yield len(names) - len(missing) + len(computed) * distributed.world
    computed = distributed.gather(computed)
    new = {names[index]: value for index, value in zip(missing, computed, strict=True)}
    if new and on_disk:
        distributed.by_main(lambda: _write(folder, key, new, frozen.about))
    return torch.stack([known[name] if name in known else new[name] for name in names])


def _compute(frozen: Frozen, view: View, images: Sequence[int]) -> Iterator[list[Tensor]]:
    device = next(frozen.network.parameters()).device
    frozen.network.eval()
    for _, pixels in view.pixels(images) if images else ():
        with torch.inference_mode():
            values = frozen.cut.activations(frozen.network, pixels.to(device, non_blocking=True))
        yield list(values.float().cpu().clone().unbind())


def _name(image: object) -> bytes:
    return hashlib.blake2b(repr(image).encode(), digest_size=_NAME).digest()


def _read(folder: Path, key: str) -> dict[bytes, Tensor]:
    """What the disk has of the key; a damaged file has nothing."""
    found: dict[bytes, Tensor] = {}
    for path in sorted(folder.glob(f"{key}-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names, values = file.get_tensor("names"), file.get_tensor("values")
            found |= zip(map(bytes, names.numpy()), values.unbind(), strict=True)
            cachefolder.mark_used(path)
        except (OSError, SafetensorError, ValueError, TypeError):
            continue
    return found


def _write(folder: Path, key: str, new: dict[bytes, Tensor], about: str) -> None:
    values = torch.stack(list(new.values()))
    reason = cachefolder.refusal(values.nbytes)
    if reason is not None:
        _log.info("features are not kept for later runs: %s", reason)
        return
    names = torch.frombuffer(bytearray(b"".join(new)), dtype=torch.uint8).reshape(-1, _NAME)
    content = to_safetensors({"names": names, "values": values}, {"about": about})
    digest = hashlib.sha256(b"".join(new)).hexdigest()[:16]
    try:
        with cachefolder.writing(len(content)):
            write_whole(folder / f"{key}-{digest}.safetensors", content)
    except CnnftError as error:
        _log.warning("features are not kept for later runs: %s", error)


def training_batches(
    values: Tensor, labels: Tensor, keys: KeyedBatches
) -> Iterator[tuple[Tensor, Tensor]]:
    """`values` (K, N, ...), `labels` (N,) -> (activations (B, ...), labels (B,)) of all epochs."""
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
