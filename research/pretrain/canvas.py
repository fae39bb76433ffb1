"""The unit square that shapes are drawn on, and the few soft primitives that they share.

Coordinates run from -1 to 1 in both directions; a drawn shape stays within radius 0.95 or so.
Every primitive returns *coverage*: float32 in [0, 1], one pixel wide at the edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """One drawn shape: three (size, size) fields in [0, 1] and what is known about it."""

    coverage: Array
    """Where the shape is."""
    relief: Array
    """Height above the ground, for shading and for colour along the shape."""
    part: Array
    """Where its second material is: a flower's disc, an insect's wings, a leaf's veins."""
    lobes: int = 0
    """Vertices, petals, pairs of limbs, arms; 0 where counting makes no sense."""
    hollow: bool = False


class Canvas:
    """Pixel-centre coordinates of a square of `size` pixels, Cartesian and polar."""

    def __init__(self, size: int) -> None:
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
        self.size = size
        self.x, self.y = np.meshgrid(axis, axis)
        self.radius = np.hypot(self.x, self.y)
        self.angle = np.arctan2(self.y, self.x)

    def soft(self, signed_distance: Array) -> Array:
        """Coverage from a signed distance in canvas units, negative inside."""
        return np.clip(0.5 - signed_distance * (self.size / 2), 0, 1).astype(np.float32)

    def contour(self, boundary: Array, x: Array | None = None, y: Array | None = None) -> Array:
        """Coverage of the star-shaped region radius < boundary(angle)."""
        radius = self.radius if x is None else np.hypot(x, y)
        return self.soft(radius - boundary)

    def ellipse(self, cx: float, cy: float, a: float, b: float, turn: float) -> tuple[Array, Array]:
        """Coverage and dome height of an ellipse with half-axes a, b turned by `turn` radians."""
        u = (self.x - cx) * np.cos(turn) + (self.y - cy) * np.sin(turn)
        v = (self.y - cy) * np.cos(turn) - (self.x - cx) * np.sin(turn)
        level = np.sqrt((u / a) ** 2 + (v / b) ** 2)
        return self.soft((level - 1) * min(a, b)), np.sqrt(np.clip(1 - level**2, 0, 1))

    def stroke(self, start: Array, end: Array, width: tuple[float, float]) -> Array:
        """Coverage of a segment whose half-width runs from width[0] to width[1]."""
        d = np.asarray(end, np.float32) - np.asarray(start, np.float32)
        t = (self.x - start[0]) * d[0] + (self.y - start[1]) * d[1]
        t = np.clip(t / (d @ d + 1e-9), 0, 1)
        away = np.hypot(self.x - start[0] - t * d[0], self.y - start[1] - t * d[1])
        return self.soft(away - (width[0] + (width[1] - width[0]) * t))

    def path(self, points: Array, width: tuple[float, float]) -> Array:
        """Coverage of a polyline (n, 2) whose half-width tapers along it."""
        widths = np.linspace(*width, len(points))
        total = np.zeros_like(self.x)
        for i in range(len(points) - 1):
            piece = self.stroke(points[i], points[i + 1], (widths[i], widths[i + 1]))
            total = np.maximum(total, piece)
        return total


def over(under: Array, above: Array, coverage: Array) -> Array:
    """`above` drawn over `under` where `coverage` says so."""
    return under + (above - under) * coverage


def around(value: float, variant: np.random.Generator, spread: float = 0.06) -> float:
    """`value` as this variant of an identity has it: a log-normal factor."""
    return value * float(np.exp(variant.normal(0, spread)))
