"""Keyed random numbers on any device, and the few image operations that the world composes with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Draw:
    """A generator that is a pure function of its key, here (seed, step, rank)."""

    def __init__(self, *key: int, device: torch.device) -> None:
        mixed = 0x9E3779B97F4A7C15
        for part in key:  # SplitMix64's multiplier keeps neighbouring keys far apart
            mixed = ((mixed ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
            mixed ^= mixed >> 31
        self.device = device
        self.generator = torch.Generator(device).manual_seed(mixed % 2**63)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        random = torch.rand(*shape, generator=self.generator, device=self.device)
        return low + (high - low) * random

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Booleans, true with `probability`."""
        return self.uniform(0, 1, *shape) < probability

    def choice(self, shares: tuple[float, ...], n: int) -> Tensor:
        """n indices, drawn as often as `shares` say."""
        edges = torch.tensor(shares[:-1], device=self.device).cumsum(0)
        return torch.bucketize(self.uniform(0, 1, n), edges)

    def views(
        self, n: int, zoom: tuple[float, float], turn: float, shift: float, squeeze: float
    ) -> Tensor:
        """n inverse affine maps (n, 2, 3) for `sample`.

        What is seen is magnified by `zoom`, turned by up to `turn` radians, moved by up to `shift`
        half-frames, mirrored half the time, and one axis squeezed by up to e^squeeze.
        """
        angle, scale = self.uniform(-turn, turn, n), self.log_uniform(*zoom, n)
        mirror = self.integers(2, n) * 2.0 - 1
        aspect = (self.uniform(-squeeze, squeeze, n)).exp()
        # Rotate in the output first, then squeeze along the object's own axes.
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [
            torch.stack([cos * aspect * mirror, sin * aspect * mirror], 1),
            torch.stack([-sin / aspect, cos / aspect], 1),
        ]
        linear = torch.stack(rows, 1)
        offset = -linear @ self.uniform(-shift, shift, n, 2, 1)
        return torch.cat([linear, offset], 2)


def sample(fields: Tensor, views: Tensor, size: int, padding: str) -> Tensor:
    """`fields` (n, c, h, w) seen through inverse affine `views` (n, 2, 3): (n, c, size, size)."""
    if not len(fields):  # affine_grid refuses an empty batch
        return fields.new_zeros(0, fields.shape[1], size, size)
    grid = F.affine_grid(views, [len(fields), 1, size, size], align_corners=False)
    return F.grid_sample(fields, grid, "bilinear", padding, align_corners=False)


def blur(fields: Tensor, width: int) -> Tensor:
    """Box blur of odd `width` pixels, same size, averaging only what lies inside the frame.

    As two products with a banded matrix: on a CPU several times faster than average pooling.
    """
    size = torch.arange(fields.shape[-1], device=fields.device)
    band = ((size[:, None] - size).abs() <= width // 2).to(fields.dtype)
    band = band / band.sum(1, keepdim=True)
    return band @ fields @ band.T


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Channels last; hue in turns."""
    offset = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offset + hue[..., None] * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)
