"""Closed contours: polygons, stars, blobs, superformulas, rosettes of petals, leaves, outlines.

Each function draws one *variant* of one *identity*: `identity` yields the parameters that all
variants share, `variant` the small deviations that make each one an individual.
"""

from __future__ import annotations

import numpy as np

from .canvas import Array, Canvas, Shape, around, over

Rng = np.random.Generator


def _solid(canvas: Canvas, boundary: Array, identity: Rng, lobes: int, x: Array, y: Array) -> Shape:
    """The region radius < boundary(angle): domed, conical or flat; some have a hole or a rim."""
    profile, rim, hole = identity.integers(3), identity.random() < 0.35, identity.random() < 0.2
    inner = identity.uniform(0.35, 0.75)
    radius = np.hypot(x, y)
    level = np.clip(radius / np.maximum(boundary, 1e-3), 0, 2)
    inside = np.clip(1 - level, 0, 1)
    relief = (np.sqrt(np.clip(1 - level**2, 0, 1)), inside, np.full_like(inside, 0.6))[profile]
    coverage = canvas.contour(boundary, x, y)
    core = canvas.contour(boundary * inner, x, y)
    if hole:
        return Shape(coverage * (1 - core), relief, np.zeros_like(core), lobes, True)
    part = core if rim else np.zeros_like(core)
    return Shape(coverage, relief, part, lobes)


def _stretched(canvas: Canvas, aspect: float, variant: Rng) -> tuple[Array, Array, Array]:
    """Coordinates squeezed along y by `aspect`, and their polar angle."""
    x, y = canvas.x, canvas.y / around(aspect, variant)
    return x, y, np.arctan2(y, x)


def _sawtooth(angle: Array, n: int) -> Array:
    """|distance to the nearest of n spokes|, from 0 on a spoke to 1 half-way between two."""
    sector = np.pi / n
    return np.abs((angle + sector) % (2 * sector) - sector) / sector


def polygon(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A regular polygon of 3 to 8 vertices, possibly squeezed, some with rounded corners."""
    n, aspect = int(identity.integers(3, 9)), identity.uniform(0.45, 1)
    rounding = identity.uniform(0, 0.5) * (identity.random() < 0.5)
    x, y, angle = _stretched(canvas, aspect, variant)
    saw = _sawtooth(angle, n)
    side = np.cos(np.pi / n) / np.cos((1 - saw) * np.pi / n)
    return _solid(canvas, 0.88 * (side * (1 - rounding) + rounding * 0.85), identity, n, x, y)


def star(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A star of 4 to 14 straight or bulging rays."""
    n, inner = int(identity.integers(4, 15)), identity.uniform(0.25, 0.75)
    aspect, bulge = identity.uniform(0.6, 1), np.exp(identity.uniform(-0.8, 0.8))
    x, y, angle = _stretched(canvas, aspect, variant)
    saw = _sawtooth(angle, n) ** around(bulge, variant)
    low = min(around(inner, variant), 0.85)
    return _solid(canvas, 0.92 * (1 - (1 - low) * saw), identity, n, x, y)


def blob(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A closed curve whose radius is a short Fourier series of the angle."""
    orders = identity.choice(np.arange(1, 8), 4, replace=False)
    sizes = identity.normal(0, 0.2, 4) / np.sqrt(orders)
    phases = identity.uniform(0, 2 * np.pi, 4)
    x, y, angle = _stretched(canvas, identity.uniform(0.5, 1), variant)
    boundary = np.ones_like(angle)
    for order, amount, phase in zip(orders, sizes, phases, strict=True):
        phase = phase + variant.normal(0, 0.12)
        boundary += around(amount, variant, 0.12) * np.cos(order * angle + phase)
    boundary = np.clip(boundary, 0.12, None)
    return _solid(canvas, 0.9 * boundary / boundary.max(), identity, 0, x, y)


def superformula(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """Gielis (2003): r = (|cos(m t/4)|^n2 + |sin(m t/4)|^n3)^(-1/n1), with m lobes."""
    m = int(identity.integers(2, 13))
    n1, n2, n3 = identity.uniform(0.5, 4), identity.uniform(0.6, 5), identity.uniform(0.6, 5)
    x, y, angle = _stretched(canvas, identity.uniform(0.6, 1), variant)
    turned = m * angle / 4
    powers = np.abs(np.cos(turned)) ** around(n2, variant) + np.abs(np.sin(turned)) ** n3
    boundary = (powers + 1e-6) ** (-1 / around(n1, variant))
    boundary = np.clip(boundary / np.percentile(boundary, 98), 0.05, 1.2)
    return _solid(canvas, 0.8 * boundary, identity, m, x, y)


def rosette(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """One to three whorls of 3 to 20 petals round a disc; the disc is the second material."""
    n, whorls = int(identity.integers(3, 21)), int(identity.integers(1, 4))
    width = identity.uniform(0.55, 1.5)
    tip = np.exp(identity.uniform(-1.2, 0.7))
    notch = identity.uniform(0, 0.35) * (identity.random() < 0.4)
    disc = identity.uniform(0.1, 0.42)
    twist = identity.uniform(-0.7, 0.7) * (identity.random() < 0.4)
    gap = identity.uniform(0, 0.3)
    coverage, relief = np.zeros_like(canvas.x), np.zeros_like(canvas.x)
    wobble = variant.normal(0, 0.05, n)
    for whorl in range(whorls):
        outer = 0.93 * (1 - 0.24 * whorl)
        angle = canvas.angle + twist * canvas.radius + (whorl % 2) * np.pi / n
        index = np.floor((angle + np.pi / n) / (2 * np.pi / n)).astype(int) % n
        saw = np.clip(_sawtooth(angle, n) / around(width, variant), 0, 1)
        reach = outer * (1 + wobble[index]) * (1 - saw**2) ** tip * (1 - notch * (1 - saw) ** 6)
        petal = canvas.soft((canvas.radius - np.maximum(reach, disc * (1 - gap))) * 0.7)
        ridge = (1 - 0.8 * saw) * (0.35 + 0.65 * np.clip(canvas.radius / outer, 0, 1))
        relief = over(relief, ridge * (0.7 + 0.15 * whorl), petal)
        coverage = np.maximum(coverage, petal)
    core, dome = canvas.ellipse(0, 0, around(disc, variant), around(disc, variant), 0)
    relief = over(relief, 0.4 + 0.6 * dome, core)
    return Shape(np.maximum(coverage, core), relief, core, n)


def leaf(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A blade along x with a serrated or lobed margin and veins, which are the second material."""
    width, skew = identity.uniform(0.18, 0.6), identity.uniform(0.6, 1.8)
    teeth, depth = int(identity.integers(2, 12)), identity.uniform(0, 0.45)
    veins, slant = int(identity.integers(2, 9)), identity.uniform(0.3, 1.2)
    bend = identity.normal(0, 0.25) + variant.normal(0, 0.12)
    y = canvas.y - bend * (canvas.x**2 - 0.4)
    along = np.clip((canvas.x + 0.9) / 1.8, 0, 1) ** around(skew, variant)
    margin = around(width, variant) * np.clip(np.sin(np.pi * along), 0, 1) ** 0.8
    margin = margin * (1 - depth * np.abs(np.sin(np.pi * teeth * along)))
    coverage = canvas.soft((np.abs(y) - margin) * 0.8)
    stalk = canvas.soft(np.abs(y) - 0.03) * (canvas.x < 0.5) * (canvas.x > -0.98)
    side = np.abs(((canvas.x - slant * np.abs(y)) * veins) % 1 - 0.5) / veins
    vein = np.maximum(canvas.soft(np.abs(y) - 0.025), canvas.soft(side - 0.018)) * coverage
    relief = np.clip(1 - np.abs(y) / np.maximum(margin, 1e-3), 0, 1) * (1 - 0.5 * vein)
    return Shape(np.maximum(coverage, stalk), relief, np.maximum(vein, stalk * (1 - coverage)))


def nested(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """Concentric wavy outlines: line art after the radial contours of Kataoka et al. (2022)."""
    n, rings = int(identity.integers(3, 13)), int(identity.integers(1, 6))
    amount, line = identity.uniform(0.02, 0.35), identity.uniform(0.05, 0.14)
    turn, aspect = identity.uniform(-0.5, 0.5), identity.uniform(0.6, 1)
    x, y, angle = _stretched(canvas, aspect, variant)
    radius = np.hypot(x, y)
    coverage = np.zeros_like(radius)
    for ring in range(rings):
        wave = np.cos(n * (angle + turn * ring) + variant.normal(0, 0.2))
        boundary = 0.88 * (ring + 1) / rings * (1 - amount * (0.5 + 0.5 * wave))
        coverage = np.maximum(coverage, canvas.soft(np.abs(radius - boundary) - line / 2))
    return Shape(coverage, np.clip(1 - radius, 0, 1), np.zeros_like(radius), n, True)
