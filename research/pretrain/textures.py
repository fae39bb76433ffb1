"""Texture families: each draws a (size, size) field in [0, 1].

As with shapes, `identity` yields the parameters of one texture, `variant` one sample of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Array, around

Rng = np.random.Generator


@dataclass(frozen=True)
class Plane:
    """Warped, turned coordinates of one sample, in cells of the texture's own frequency."""

    size: int
    u: Array
    v: Array


def spectral(
    rng: Rng, size: int, exponent: float, turn: float = 0.0, stretch: float = 1.0, peak: float = 0.0
) -> Array:
    """Gaussian noise of unit variance: amplitude 1/f^exponent, or a band round `peak` cycles."""
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    across = (-fx * np.sin(turn) + fy * np.cos(turn)) * stretch
    f = np.hypot(fx * np.cos(turn) + fy * np.sin(turn), across) + 1e-3
    gain = np.exp(-0.5 * (np.log(f / peak) / 0.3) ** 2) if peak else f**-exponent
    gain[0, 0] = 0
    noise = rng.normal(size=gain.shape) + 1j * rng.normal(size=gain.shape)
    field = np.fft.irfft2(gain * noise, s=(size, size))
    return (field / (field.std() + 1e-9)).astype(np.float32)


def _plane(identity: Rng, variant: Rng, size: int) -> Plane:
    """3 to 22 cells across, at any angle, often warped by smooth noise."""
    cells, turn = np.exp(identity.uniform(np.log(3), np.log(22))), identity.uniform(0, np.pi)
    warp = identity.uniform(0.02, 0.14) * (identity.random() < 0.6)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    x = x + warp * spectral(variant, size, 2.0) * 0.5
    y = y + warp * spectral(variant, size, 2.0) * 0.5
    turn, cells = turn + variant.normal(0, 0.06), around(cells, variant)
    u = (x * np.cos(turn) + y * np.sin(turn)) * cells + variant.random()
    v = (y * np.cos(turn) - x * np.sin(turn)) * cells + variant.random()
    return Plane(size, u, v)


def noise(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """1/f noise, isotropic to strongly drawn out."""
    exponent, turn = identity.uniform(0.6, 2.4), identity.uniform(0, np.pi)
    return spectral(variant, plane.size, exponent, turn, np.exp(identity.uniform(0, 1.6)))


def band(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Band-pass noise: blotches of one size, soft to hard-edged."""
    peak, hard = np.exp(identity.uniform(1.4, 3.4)), np.exp(identity.uniform(-0.7, 1.8))
    turn, stretch = identity.uniform(0, np.pi), np.exp(identity.uniform(0, 1.2))
    return np.tanh(hard * spectral(variant, plane.size, 0, turn, stretch, peak))


def stripes(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Stripes of any duty cycle and sharpness."""
    sharp, duty = np.exp(identity.uniform(0, 2.5)), identity.uniform(-0.7, 0.7)
    return np.tanh(sharp * (np.sin(2 * np.pi * plane.u) - duty))


def checks(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Chequers and their oblong and sheared relatives."""
    sharp, long = np.exp(identity.uniform(0, 2.5)), identity.choice([1.0, 1.0, 0.5])
    shear = identity.uniform(0, 0.6) * (identity.random() < 0.3)
    u = plane.u + shear * plane.v
    return np.tanh(sharp * np.sin(np.pi * u) * np.sin(np.pi * plane.v * long))


def dots(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Dots or rings on a square or staggered grid."""
    radius, ring = identity.uniform(0.15, 0.42), identity.random() < 0.3
    v = plane.v + (np.floor(plane.u) % 2) * 0.5 * (identity.random() < 0.5)
    away = np.hypot(plane.u % 1 - 0.5, v % 1 - 0.5)
    away = np.abs(away - radius * 0.8) + radius * 0.7 if ring else away
    return np.tanh(np.exp(identity.uniform(1.0, 3.0)) * (radius - away))


def _neighbours(identity: Rng, variant: Rng, plane: Plane) -> tuple[Array, Array, Array, int]:
    """Distances to the two nearest of scattered points (Worley 1996), which is nearest, count."""
    side = int(identity.integers(3, 13))
    loose, squeeze = identity.uniform(0.1, 0.5), identity.uniform(1, 1.9)
    lattice = np.arange(-1, side + 1)
    grid = np.stack(np.meshgrid(lattice, lattice), -1).reshape(-1, 2)
    points = ((grid + 0.5 + variant.normal(0, loose, grid.shape)) / side).astype(np.float32)
    axis = (np.arange(plane.size, dtype=np.float32) + 0.5) / plane.size
    x, y = np.meshgrid(axis, axis)
    pixels = np.stack([x.ravel(), y.ravel()], 1)
    scale = np.array([1, squeeze], np.float32)
    pixels, points = pixels * scale, points * scale
    squared = (pixels**2).sum(1)[:, None] - 2 * pixels @ points.T + (points**2).sum(1)[None]
    nearest = np.argpartition(squared, 1, axis=1)[:, :2]
    pair = np.sqrt(np.clip(np.take_along_axis(squared, nearest, 1), 0, None)) * side
    swap = pair[:, 0] > pair[:, 1]
    index = np.where(swap, nearest[:, 1], nearest[:, 0]).reshape(x.shape)
    return pair.min(1).reshape(x.shape), pair.max(1).reshape(x.shape), index, len(points)


def cracks(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Lines between Voronoi cells: cracked earth, nets, scales."""
    first, second, _, _ = _neighbours(identity, variant, plane)
    sharp, cone = np.exp(identity.uniform(0.5, 2.8)), identity.uniform(0, 0.8)
    return np.tanh(sharp * (second - first)) - cone * first * (identity.random() < 0.4)


def bumps(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Round bumps or bubbles, some with a rim."""
    first, _, _, _ = _neighbours(identity, variant, plane)
    tight, rim = np.exp(identity.uniform(0.3, 2.2)), identity.random() < 0.4
    return np.exp(-((first - 0.35) ** 2) * 12 * tight) if rim else np.exp(-(first**2) * 2 * tight)


def mosaic(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Voronoi cells of different greys, flat or faceted like crystals."""
    first, _, index, count = _neighbours(identity, variant, plane)
    tilt = variant.normal(0, identity.uniform(0, 0.6), (count, 2))
    slope = tilt[index, 0] * (plane.u % 1) + tilt[index, 1] * (plane.v % 1)
    return variant.random(count)[index] + slope * 0.5 - identity.uniform(0, 0.6) * first


def leaves(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Dead leaves (Lee, Mumford & Huang 2001): ellipses or boxes dropped one over another."""
    small, large = identity.uniform(0.015, 0.06), identity.uniform(0.08, 0.3)
    box, aspect = identity.random() < 0.35, identity.uniform(0.3, 1)
    aligned, turn = identity.random() < 0.4, identity.uniform(0, np.pi)
    size = plane.size
    field = np.zeros((size, size), np.float32)
    for _ in range(300):
        u = variant.random()
        r = (small**-2 * (1 - u) + large**-2 * u) ** -0.5 * size
        cx, cy = variant.random(2) * size
        top, bottom = max(0, int(cy - r)), min(size, int(cy + r) + 2)
        left, right = max(0, int(cx - r)), min(size, int(cx + r) + 2)
        rows = np.arange(top, bottom, dtype=np.float32)[:, None]
        columns = np.arange(left, right, dtype=np.float32)
        a = turn if aligned else variant.uniform(0, np.pi)
        p = (columns - cx) * np.cos(a) + (rows - cy) * np.sin(a)
        q = ((rows - cy) * np.cos(a) - (columns - cx) * np.sin(a)) / aspect
        inside = np.maximum(np.abs(p), np.abs(q)) < r * 0.7 if box else p * p + q * q < r * r
        grey = variant.random() + variant.normal(0, 0.3) * p / r
        field[top:bottom, left:right][inside] = grey[inside]
    return field


def marble(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Waves bent by noise (Perlin 1985), straight or in growth rings."""
    amount, rings = identity.uniform(0.4, 2.5), identity.random() < 0.4
    cloud = spectral(variant, plane.size, identity.uniform(1.5, 2.5))
    phase = np.hypot(plane.u - 2, plane.v * 0.5 - 1) if rings else plane.u * 0.6
    return np.sin(2 * np.pi * (phase * 0.6 + amount * 0.5 * cloud))


def bricks(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Courses of bricks with mortar, each brick of its own grey."""
    long, joint = identity.uniform(0.3, 1), np.exp(identity.uniform(1, 3))
    row = np.floor(plane.v)
    a = plane.u * long + identity.choice([0, 0.5]) * (row % 2)
    edge = np.minimum(np.minimum(a % 1, 1 - a % 1) / long, np.minimum(plane.v % 1, 1 - plane.v % 1))
    grey = np.sin(np.floor(a) * 12.9898 + row * 78.233) * identity.uniform(0, 0.5)
    return np.tanh(edge * joint * 2) + grey


def weave(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Threads over and under one another: cloth, baskets, braids."""
    over = (np.floor(plane.u) + np.floor(plane.v) * identity.choice([1, 2])) % 2
    dim, fine = identity.uniform(0.4, 1), int(identity.integers(1, 4))
    warp, weft = np.abs(np.sin(np.pi * plane.u * fine)), np.abs(np.sin(np.pi * plane.v * fine))
    crown = np.sin(np.pi * (plane.v % 1)) * over + np.sin(np.pi * (plane.u % 1)) * (1 - over)
    return np.where(over > 0, warp, dim * weft) * (0.4 + 0.6 * crown)


def hatching(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Two sets of thin lines crossing at any angle."""
    thin, cross = int(identity.integers(1, 5)), identity.uniform(0.4, 2.7)
    other = plane.u * np.cos(cross) + plane.v * np.sin(cross)
    lines = [np.abs(np.sin(np.pi * p)) ** thin for p in (plane.u, other)]
    return np.maximum(*lines) if identity.random() < 0.6 else sum(lines)


def scratches(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Fibres, fur and scratches: strongly drawn out noise in one or two directions."""
    stretch, cross = np.exp(identity.uniform(1.4, 3)), identity.uniform(0.2, 2.5)
    turn, single = identity.uniform(0, np.pi), identity.random() < 0.5
    first = spectral(variant, plane.size, 0.4, turn, stretch)
    if single:
        return first
    return np.maximum(first, spectral(variant, plane.size, 0.4, turn + cross, stretch))


def ridges(identity: Rng, variant: Rng, plane: Plane) -> Array:
    """Ridged noise (Musgrave 1994): webs, veins, wrinkles, lightning."""
    field, gain = np.zeros((plane.size, plane.size), np.float32), 1.0
    peak, sharp = np.exp(identity.uniform(0.9, 2.2)), identity.uniform(0.8, 3)
    for _ in range(3):
        layer = 1 - np.abs(np.tanh(spectral(variant, plane.size, 0, peak=peak) * sharp))
        field, gain, peak = field + gain * layer**2, gain * 0.5, peak * 2
    return field


FAMILIES = (
    *(noise, band, stripes, checks, dots, cracks, bumps, mosaic),
    *(leaves, marble, bricks, weave, hatching, scratches, ridges),
)


def texture(family: int, identity_seed: int, variant_seed: int, size: int) -> Array:
    """One sample (size, size) in [0, 1] of texture `identity_seed`, with some grain of its own."""
    identity = np.random.default_rng(identity_seed)
    variant = np.random.default_rng((identity_seed, variant_seed))
    plane = _plane(identity, variant, size)
    field = FAMILIES[family](identity, variant, plane)
    grain = identity.uniform(0, 0.25) * (identity.random() < 0.7)
    low, high = np.percentile(field, [1, 99])
    field = (field - low) / (high - low + 1e-6)
    return np.clip(field + grain * 0.4 * spectral(variant, size, identity.uniform(0.5, 1.5)), 0, 1)
