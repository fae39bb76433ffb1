"""Figures put together from pieces: creatures, branches, glyphs, clusters, fractals.

Same convention as in `contours`: `identity` gives what all variants share, `variant` what they do
not.
"""

from __future__ import annotations

import numpy as np

from .canvas import Array, Canvas, Shape, around, over

Rng = np.random.Generator


def creature(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A segmented body along x; its limbs, wings and feelers are the second material."""
    segments, pairs = int(identity.integers(1, 5)), int(identity.integers(0, 5))
    wings = int(identity.integers(0, 3))
    thickness = identity.uniform(0.1, 0.3, segments)
    lengths = identity.uniform(0.5, 1.5, segments)
    lengths = lengths / lengths.sum() * identity.uniform(0.5, 0.9)
    limb = {
        "reach": identity.uniform(0.35, 0.8),
        "slope": identity.uniform(-0.5, 0.5),
        "width": identity.uniform(0.015, 0.05),
    }
    wing = identity.uniform(0.4, 0.85), identity.uniform(0.1, 0.28), identity.uniform(0.5, 1.4)
    feeler = identity.uniform(0.2, 0.5) * (identity.random() < 0.6)

    centres = np.cumsum(lengths * 2) - lengths - lengths.sum()
    waist = centres[min(1, segments - 1)]
    appendages = np.zeros_like(canvas.x)
    relief = np.zeros_like(canvas.x)
    for side in (-1, 1):
        for i in range(pairs):
            legs = _limb(waist + (i - (pairs - 1) / 2) * 0.16, side, i, limb, variant)
            appendages = np.maximum(appendages, canvas.path(legs, (limb["width"], 0.012)))
        for i in range(wings):
            long, wide, lean = around(wing[0], variant), around(wing[1], variant), wing[2]
            turn = side * (lean + 0.5 * i + variant.normal(0, 0.1))
            cx, cy = waist - 0.1 + long / 2 * np.cos(turn), long / 2 * np.sin(turn)
            sheet, dome = canvas.ellipse(cx, cy, long / 2, wide, turn)
            appendages, relief = np.maximum(appendages, sheet), over(relief, 0.5 * dome, sheet)
        if feeler:
            tip = np.array([centres[-1] + lengths[-1] + feeler, side * around(0.25, variant)])
            start = np.array([centres[-1], 0.0])
            appendages = np.maximum(appendages, canvas.stroke(start, tip, (0.025, 0.012)))
    body = np.zeros_like(canvas.x)
    for centre, length, thick in zip(centres, lengths, thickness, strict=True):
        a, b = around(length * 1.1, variant), around(thick, variant)
        piece, dome = canvas.ellipse(centre, variant.normal(0, 0.02), a, b, variant.normal(0, 0.06))
        body, relief = np.maximum(body, piece), over(relief, 0.3 + 0.7 * dome, piece)
    return Shape(np.maximum(body, appendages), relief, appendages * (1 - body), pairs + wings)


def _limb(x: float, side: int, i: int, limb: dict[str, float], variant: Rng) -> Array:
    """A two-jointed leg as a polyline (3, 2)."""
    lean = limb["slope"] + 0.5 * (i - 1) + variant.normal(0, 0.12)
    reach = around(limb["reach"], variant, 0.1)
    knee = [x + 0.4 * lean * reach, side * reach * 0.55]
    foot = [x + lean * reach, side * reach * (1 + 0.1 * variant.normal())]
    return np.array([[x, 0.0], knee, foot])


def branching(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """A trunk that forks 3 or 4 times, with or without a leaf or berry at each tip."""
    forks, depth = int(identity.integers(2, 4)), int(identity.integers(2, 4))
    spread, shrink = identity.uniform(0.3, 1.0), identity.uniform(0.55, 0.8)
    width = identity.uniform(0.05, 0.13)
    berry = identity.uniform(0.06, 0.15) * (identity.random() < 0.6)
    wood, tips, relief = (np.zeros_like(canvas.x) for _ in range(3))
    first = 1.7 * (1 - shrink) / (1 - shrink ** (depth + 1))
    twigs = [(np.array([0.0, -0.9]), np.pi / 2, first, 0)]
    while twigs:
        start, heading, length, level = twigs.pop()
        heading, length = heading + variant.normal(0, 0.12), around(length, variant, 0.1)
        end = start + length * np.array([np.cos(heading), np.sin(heading)])
        thick = width * 0.65**level
        wood = np.maximum(wood, canvas.stroke(start, end, (thick, thick * 0.7)))
        if level < depth:
            fan = np.linspace(-spread, spread, forks)
            twigs += [(end, heading + turn, length * shrink, level + 1) for turn in fan]
        elif berry:
            ball, dome = canvas.ellipse(*end, berry * 1.5, berry, heading)
            tips, relief = np.maximum(tips, ball), over(relief, dome, ball)
    relief = np.maximum(relief, 0.4 * wood)
    return Shape(np.maximum(wood, tips), relief, tips, forks)


def glyph(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """One to four broad strokes, straight or curved, between points of a 3 x 3 grid."""
    strokes, width = int(identity.integers(1, 5)), identity.uniform(0.05, 0.16)
    coverage, relief = np.zeros_like(canvas.x), np.zeros_like(canvas.x)
    t = np.linspace(0, 1, 9)[:, None]
    for _ in range(strokes):
        knots = (identity.integers(-1, 2, (3, 2)) * 0.72).astype(float)
        knots[2] += 0.72 * (np.abs(knots[2] - knots[0]).sum() < 0.1)
        knots += variant.normal(0, 0.05, knots.shape)
        curve = (1 - t) ** 2 * knots[0] + 2 * t * (1 - t) * knots[1] + t**2 * knots[2]
        piece = canvas.path(curve, (width, around(width, variant, 0.15)))
        coverage, relief = np.maximum(coverage, piece), over(relief, 0.4 + 0.6 * piece, piece)
    return Shape(coverage, relief, np.zeros_like(coverage), strokes)


def cluster(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """Florets, berries or scales: a sunflower spiral (Vogel 1979) or a loose heap of ellipses."""
    count, spiral = int(np.exp(identity.uniform(np.log(4), np.log(60)))), identity.random() < 0.5
    aspect, squeeze = identity.uniform(0.4, 1), identity.uniform(0.5, 1)
    index = np.arange(count)
    radius = 0.8 * np.sqrt((index + 0.5) / count)
    angle = index * np.pi * (3 - np.sqrt(5))
    if not spiral:
        angle = identity.uniform(0, 2 * np.pi, count)
        radius = 0.75 * np.sqrt(identity.random(count))
    size = around(identity.uniform(0.8, 1.5), variant) * 0.75 / np.sqrt(count)
    coverage, relief, part = (np.zeros_like(canvas.x) for _ in range(3))
    second = identity.random(count) < identity.uniform(0, 0.6)
    for i in index[::-1]:
        cx = radius[i] * np.cos(angle[i]) + variant.normal(0, 0.02)
        cy = radius[i] * np.sin(angle[i]) * squeeze + variant.normal(0, 0.02)
        ball, dome = canvas.ellipse(cx, cy, size, size * aspect, angle[i])
        coverage, relief = np.maximum(coverage, ball), over(relief, dome, ball)
        part = over(part, np.full_like(part, second[i]), ball)
    return Shape(coverage, relief, part)


def fractal(canvas: Canvas, identity: Rng, variant: Rng) -> Shape:
    """The attractor of an iterated function system, drawn by the chaos game.

    Singular values are constrained as in Anderson & Farrell (2022), "Improving fractal
    pre-training": the sum of s1 + 2 s2 over the n maps lies in [(5 + n) / 2, (6 + n) / 2], which
    keeps the attractor neither dust nor blot.
    """
    while True:
        maps = _contractions(identity)
        weight = np.abs(np.linalg.det(maps[:, :, :2])) + 1e-3
        if 0.1 < (_chaos(maps, weight, canvas.size, identity, 60) > 0).mean() < 0.8:
            break
    maps = maps.copy()
    maps[:, :, :2] += variant.normal(0, 0.015, maps[:, :, :2].shape)
    largest = np.linalg.svd(maps[:, :, :2], compute_uv=False)[:, 0]
    maps[:, :, :2] *= np.minimum(1, 0.98 / largest)[:, None, None]
    hits = np.log1p(_chaos(maps, weight, canvas.size, variant, 240))
    density = np.clip(hits / (np.percentile(hits, 99) + 1e-6), 0, 1).astype(np.float32)
    return Shape(np.clip(density * 2.5, 0, 1), density, np.zeros_like(density))


def _contractions(rng: Rng) -> Array:
    """n in 2..7 affine maps (n, 2, 3)."""
    n = int(rng.integers(2, 8))
    while True:
        singular = np.sort(rng.random((n, 2)), axis=1)[:, ::-1]
        singular = singular * rng.uniform((5 + n) / 2, (6 + n) / 2) / (singular @ [1, 2]).sum()
        if singular.max() < 1:
            break
    maps = rng.uniform(-1, 1, (n, 2, 3))
    for i in range(n):
        left, right = (_rotation(a) for a in rng.uniform(-np.pi, np.pi, 2))
        maps[i, :, :2] = left @ np.diag(singular[i] * rng.choice([-1, 1], 2)) @ right
    return maps


def _rotation(a: float) -> Array:
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def _chaos(maps: Array, weight: Array, size: int, rng: Rng, steps: int) -> Array:
    """Hits per pixel (size, size) of many short random walks, framed on the attractor."""
    walkers, seen = 300, []
    at = np.zeros((walkers, 2))
    for step in range(steps + 20):
        choice = maps[rng.choice(len(maps), walkers, p=weight / weight.sum())]
        at = np.einsum("nij,nj->ni", choice[:, :, :2], at) + choice[:, :, 2]
        if step >= 20:
            seen.append(at)
    points = np.concatenate(seen)
    low, high = np.percentile(points, [1, 99], axis=0)
    span = float((high - low).max()) * 1.15 + 1e-6
    frame = [(c - span / 2, c + span / 2) for c in (low + high) / 2]
    return np.histogram2d(points[:, 0], points[:, 1], bins=size, range=frame)[0]
