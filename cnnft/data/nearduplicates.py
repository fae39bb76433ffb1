"""Near-duplicates: images that a person would call the same picture, although their files differ.

Resaved, resized, brighter or darker, slightly blurred or cropped (2 %) copies are found; mirrored
or recoloured ones, and other photographs of the same thing, are not meant. Two steps: descriptors
of coarse structure are compared for all pairs (one matrix product per block); what is close is then
aligned and compared pixel by pixel, in colour. docs/near-duplicates.md measures misses and false
alarms.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SIZE = 32
"""Pixels: side of a thumbnail. What is smaller than 1/32 of the image is not seen."""

Pair = tuple[int, int]
Thumbnail = NDArray[np.uint8]
"""(SIZE, SIZE, 3)"""

_FREQUENCIES = 8
_CLOSE = 0.42
"""Distance of two descriptors (unit vectors) below which the pixels are compared."""
_BLOCK = 2048  # images whose descriptors are compared at once: 16 MB of distances
_BATCH = 256  # pairs that are aligned at once
_PARTNERS = 20  # per image: of thousands that all look the same, not every pair is wanted

_STEPS = 4  # Gauss-Newton converges in two or three
_BORDER = 2  # pixels that alignment may move out of sight
_WHITE = 250.0  # brightening clips there,
_BRIGHTENED, _PALE = 1.03, 215.0  # and with such a gain in parts of such cells

# What a copy may differ by, chosen on four of the five datasets of docs/near-duplicates.md.
_MOST_SHIFT = 1.5  # pixels of a thumbnail: a crop of 2 % at each edge moves edges by 0.64
_MOST_GAIN = 1.67
_LEAST_CONTRAST = 2.0  # of 255: standard deviation; blank pictures have nothing to compare
_MOST_PIXELS = 0.12  # of the contrast
_MOST_EDGES = 0.25  # of the contrast of edges
_MOST_IN_A_SPOT = (4.0, 6.0)  # of 255, or of the mean difference: a small object, a word


def thumbnail(image: Image.Image) -> Thumbnail:
    """(SIZE, SIZE, 3): the mean colour of each cell of an RGB image."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def near_duplicates(thumbnails: Sequence[Thumbnail]) -> list[Pair]:
    """Pairs (i, j), i < j, of images that look the same, in order.

    Of an image that looks like more than _PARTNERS others, the first ones are among the pairs.
    Time is quadratic in the number of images, with a small constant (docs/near-duplicates.md).
    """
    found: list[Pair] = []
    if len(thumbnails) < 2:
        return found
    pixels = np.stack(thumbnails)
    partners = np.zeros(len(pixels), np.int64)
    for candidates in _close(descriptors(pixels)):
        for part in np.split(candidates, range(_BATCH, len(candidates), _BATCH)):
            wanted = part[(partners[part] < _PARTNERS).any(axis=1)]
            if not len(wanted):
                continue
            same = wanted[look_the_same(pixels[wanted[:, 0]], pixels[wanted[:, 1]])]
            np.add.at(partners, same.ravel(), 1)
            found += [(int(i), int(j)) for i, j in same]
    return sorted(found)


def stars(pairs: Iterable[Pair]) -> list[tuple[int, ...]]:
    """Groups in which every member looks like the first, so that A ~ B ~ C ~ … glues no chain.

    Whatever is in a pair is in a group, and most in one only (greedy star cover of the graph;
    Aslam, Pelekhov and Rus, 2004).
    """
    near: dict[int, list[int]] = {}
    for i, j in pairs:
        near.setdefault(i, []).append(j)
        near.setdefault(j, []).append(i)
    taken: set[int] = set()
    groups: list[tuple[int, ...]] = []
    for centre in sorted(near, key=lambda i: (-len(near[i]), i)):
        if centre not in taken:
            others = [i for i in near[centre] if i not in taken] or near[centre][:1]
            groups.append((centre, *sorted(others)))
            taken.update(groups[-1])
    return sorted(groups)


# ---------------------------------------------------------------- candidates


def descriptors(pixels: Thumbnail) -> Tensor:
    """(N, SIZE, SIZE, 3) -> (N, 63) unit vectors: low frequencies of the luminance (DCT), each
    times its frequency, as in the gradient: large shapes would outweigh all else.
    """
    n, k = torch.arange(SIZE), torch.arange(_FREQUENCIES)
    basis = torch.cos(torch.pi * (2 * n + 1) * k[:, None] / (2 * SIZE))
    basis[0] /= 2**0.5
    weights = (k[:, None] ** 2 + k**2).sqrt()
    parts = [
        (basis @ _luminance(torch.from_numpy(part)) @ basis.T * weights).flatten(1)[:, 1:]
        for part in np.split(pixels, range(_BLOCK, len(pixels), _BLOCK))
    ]
    return F.normalize(torch.cat(parts))


def _luminance(pixels: Tensor) -> Tensor:
    return pixels.float() @ torch.tensor([0.299, 0.587, 0.114])


def _close(vectors: Tensor) -> Iterator[NDArray[np.int64]]:
    """Yields (K, 2) pairs of a block whose distance is below _CLOSE, the first images' first."""
    least = 1 - _CLOSE**2 / 2
    starts = range(0, len(vectors), _BLOCK)
    for a in starts:
        for b in starts[a // _BLOCK :]:
            products = vectors[a : a + _BLOCK] @ vectors[b : b + _BLOCK].T
            close = products > least
            pairs = (close.triu(1) if a == b else close).nonzero().numpy()
            if len(pairs):
                yield pairs + np.array([a, b])


# ---------------------------------------------------------------- comparison


def look_the_same(first: Thumbnail, second: Thumbnail) -> NDArray[np.bool_]:
    """(N, SIZE, SIZE, 3) twice -> (N,): whether each pair is one picture.

    The darker image is moved and stretched a little, and made brighter, until it fits the other
    best; what remains must be small: in all pixels, in the edges, and in every spot.
    """
    swapped = (first.mean((1, 2, 3)) > second.mean((1, 2, 3)))[:, None, None, None]
    dark = _smooth(np.where(swapped, second, first))
    bright = _smooth(np.where(swapped, first, second))
    inside = slice(_BORDER, SIZE - _BORDER)
    moved = _move(dark, _alignment(dark, bright))[:, :, inside, inside]
    bright = bright[:, :, inside, inside]
    fitted, gain = _brightened(moved, bright)
    fitted = torch.where((bright >= _WHITE) & (fitted >= _WHITE), bright, fitted)
    difference = (fitted - bright).square()
    mean = difference.mean((1, 2, 3))
    contrast = bright.var((1, 2, 3))
    edges = torch.cat(_gradient(bright), 1), torch.cat(_gradient(fitted), 1)
    in_edges = (edges[0] - edges[1]).square().mean((1, 2, 3))
    edge_contrast = torch.maximum(*(part.square().mean((1, 2, 3)) for part in edges))
    # Of a cell that is white in part, brightening clips a part.
    clipped = (gain > _BRIGHTENED)[:, None, None, None] & (fitted > _PALE) & (fitted > bright)
    difference = difference.masked_fill(clipped, 0)
    spots = F.avg_pool2d(difference.mean(1, keepdim=True), 2).amax((1, 2, 3)).sqrt()
    return (
        (contrast > _LEAST_CONTRAST**2)
        & (gain < _MOST_GAIN)
        & (gain > 1 / _MOST_GAIN)
        & (mean < _MOST_PIXELS**2 * contrast)
        & (in_edges < _MOST_EDGES**2 * edge_contrast)
        & (spots < (_MOST_IN_A_SPOT[1] * mean.sqrt()).clamp(min=_MOST_IN_A_SPOT[0]))
    ).numpy()


def _smooth(pixels: Thumbnail) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W) without what a shift by a part of a pixel changes wholly."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    padded = F.pad(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (1, 1, 1, 1), "replicate")
    return F.conv2d(padded, torch.outer(kernel, kernel).expand(3, 1, 3, 3), groups=3)


def _gradient(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y."""
    padded = F.pad(pixels, (1, 1, 1, 1), "replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return across / 2, down / 2


def _alignment(dark: Tensor, bright: Tensor) -> Tensor:
    """(N, 4): shift and stretch along x and y, in pixels at the edges, that fit `dark` to `bright`.

    Gauss-Newton on luminance; gain and offset of the brightness are fitted with them.
    """
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    dark, bright = (dark * weights).sum(1, True), (bright * weights).sum(1, True)
    inside = slice(_BORDER, SIZE - _BORDER)
    x = torch.linspace(-1, 1, SIZE)
    y = x[:, None]
    target = bright[:, 0, inside, inside].flatten(1)
    moves = torch.zeros(len(dark), 4)
    damping = 0.1 * target.shape[1] * torch.diag(torch.tensor([1e-3, 1e-3, 1.0, 1.0, 1.0, 1.0]))
    for _ in range(_STEPS):
        now = _move(dark, moves)
        across, down = _gradient(now)
        columns = [now, torch.ones_like(now), across, down, x * across, y * down]
        slopes = torch.cat(columns, 1)[:, :, inside, inside].flatten(2)
        # White that was clipped says nothing about the brightness.
        seen = slopes * ((target < _WHITE) | (slopes[:, 0] < _WHITE / _MOST_GAIN))[:, None]
        normal = (seen @ slopes.mT).double() + damping
        solved = torch.linalg.solve(normal, (seen @ target[..., None]).double()).float()[..., 0]
        moves = moves + solved[:, 2:] / solved[:, :1].clamp(0.5, 2)
        moves = moves.clamp(-_MOST_SHIFT, _MOST_SHIFT)
    return moves


def _move(pixels: Tensor, moves: Tensor) -> Tensor:
    unit = 2 / (SIZE - 1)
    affine = torch.zeros(len(pixels), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = 1 + unit * moves[:, 2], 1 + unit * moves[:, 3]
    affine[:, :, 2] = unit * moves[:, :2]
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=True)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=True)


def _brightened(dark: Tensor, bright: Tensor) -> tuple[Tensor, Tensor]:
    """`dark` with the gain and offset that fit `bright` best, of all channels together; the gain.

    Twice: in the second fit, what the first takes to white and is white does not count.
    """
    x, y = dark.flatten(1), bright.flatten(1)
    weight = torch.ones_like(x)
    for _ in range(2):
        total = weight.sum(1, True).clamp(min=1)
        mean_x, mean_y = (weight * x).sum(1, True) / total, (weight * y).sum(1, True) / total
        spread = (weight * (x - mean_x).square()).sum(1, True)
        gain = (weight * (x - mean_x) * (y - mean_y)).sum(1, True) / spread.clamp(min=1e-3)
        fitted = mean_y + gain * (x - mean_x)
        weight = 1 - ((y >= _WHITE) & (fitted >= _WHITE)).float()
    return fitted.clamp(0, 255).view_as(dark), gain[:, 0]
