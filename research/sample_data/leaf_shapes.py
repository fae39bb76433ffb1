"""The outlines and veins of the leaves in the sample data set: geometry without colour or light."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator
Array = np.ndarray


@dataclass
class Leaf:
    """Outlines and veins in leaf coordinates: the stalk ends at (0, 0), the tip is near (0, 1)."""

    blades: list[Array]
    veins: list[tuple[Array, float]]  # polyline and its width


def closed(right: Array, left: Array) -> Array:
    """An outline from two edges, both listed from the stalk to the tip."""
    return np.concatenate([right, left[::-1]])


def oak(rng: Rng) -> Leaf:
    """Rounded lobes along a midrib, widest above the middle."""
    t = np.linspace(0, 1, 160)
    lobes, depth = rng.uniform(3.2, 4.4), rng.uniform(0.55, 0.72)
    envelope = rng.uniform(0.3, 0.38) * np.sin(np.pi * t**1.25) ** 0.6
    edges, veins = [], [(np.array([(0, -0.16), (0, 0.97)]), 0.022)]
    for side in (1, -1):
        phase = rng.uniform(-0.12, 0.12)
        wave = np.abs(np.sin(np.pi * (lobes * t + phase))) ** 0.75
        x = envelope * (1 - depth * (1 - wave) * np.sin(np.pi * t) ** 0.3)
        edges.append(np.stack([side * x, t + 0.35 * x], 1))  # lobes point to the tip
        for k in np.arange(0.5, lobes):
            at = (k - phase) / lobes
            reach = 0.8 * np.interp(at, t, x)
            veins.append((np.array([(0, at - 0.06), (side * reach, at + 0.35 * reach)]), 0.012))
    return Leaf([closed(*edges)], veins)


def maple(rng: Rng) -> Leaf:
    """Five pointed, toothed lobes that spread from the end of the stalk."""
    lobe = np.array(
        [(0.36, 0.13), (0.52, 0.2), (0.56, 0.25), (0.62, 0.15), (0.8, 0.13), (0.8, 0.05)]
    )
    spread, width = rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.15)
    outline, veins = [(0.0, 0.22)], [(np.array([(0, -0.15), (0, 0.25)]), 0.022)]
    for k, reach in zip((-2, -1, 0, 1, 2), (0.46, 0.66, 0.76, 0.66, 0.46), strict=True):
        reach *= rng.uniform(0.93, 1.07)
        angle = k * spread + rng.normal(0, 0.05)
        along = np.array([np.sin(angle), np.cos(angle)])
        across = np.array([np.cos(angle), -np.sin(angle)])
        teeth = lobe * (1, width) + rng.normal(0, 0.012, lobe.shape)
        rising = [(u, -v) for u, v in teeth]
        for u, v in [*rising, (1.0, 0.0), *teeth[::-1]]:
            outline.append(tuple((0, 0.25) + reach * (u * along + v * across)))
        veins.append((np.array([(0, 0.25), (0, 0.25) + 0.93 * reach * along]), 0.018))
        for side in (-1, 1):
            branch = [0.38 * along, 0.55 * along + 0.18 * side * across]
            veins.append(((0, 0.25) + reach * np.array(branch), 0.009))
    return Leaf([np.array(outline)], veins)


def ginkgo(rng: Rng) -> Leaf:
    """A fan with a wavy rim, a notch in the middle and veins that all start at the stalk."""
    half = rng.uniform(0.85, 1.15)
    angle = np.linspace(-half, half, 160)
    phases = rng.uniform(0, 6, (4, 1))
    waves = rng.normal(0, 0.022, 4) @ np.sin(np.outer((5, 9, 14, 21), angle) + phases)
    notch = rng.uniform(0.1, 0.4) * np.exp(-(((angle - rng.normal(0, 0.06)) / 0.07) ** 2))
    rim = 0.66 + 0.04 * np.cos(2 * angle) + waves - notch
    side = np.linspace(0, 0.92, 20)
    curve = 0.12 * np.sin(np.pi * side)  # the straight sides bend inwards
    points = [(s * rim[0], -half + c) for s, c in zip(side, curve, strict=True)]
    points += list(zip(rim, angle, strict=True))
    points += [(s * rim[-1], half - c) for s, c in zip(side[::-1], curve[::-1], strict=True)]
    radius, theta = np.array(points).T
    blade = np.stack([radius * np.sin(theta), 0.3 + radius * np.cos(theta)], 1)
    veins = [(np.array([(0, -0.12), (0, 0.34)]), 0.024)]
    for a, r in zip(angle[8:-8:9], rim[8:-8:9], strict=True):
        steps, turn = r * np.array([0.03, 0.3, 0.95]), a * np.array([0.8, 0.9, 1.0])
        veins.append((np.stack([steps * np.sin(turn), 0.3 + steps * np.cos(turn)], 1), 0.007))
    return Leaf([blade], veins)


def willow(rng: Rng) -> Leaf:
    """A narrow blade with a fine saw edge and a long tip."""
    t = np.linspace(0, 1, 160)
    x = rng.uniform(0.095, 0.135) * np.sin(np.pi * t**0.85) ** 0.9 * (1.15 - 0.4 * t)
    saw = 1 + 0.07 * ((t * rng.integers(20, 28)) % 1)
    right = np.stack([x * saw, 1.3 * t - 0.15], 1)
    veins = [(np.array([(0, -0.3), (0, 1.1)]), 0.016)]
    for at in np.linspace(0.1, 0.85, 12):
        reach, y = 0.8 * np.interp(at, t, x), 1.3 * at - 0.15
        veins += [(np.array([(0, y), (side * reach, y + 0.07)]), 0.006) for side in (-1, 1)]
    return Leaf([closed(right, right * (-1, 1))], veins)


def fern(rng: Rng) -> Leaf:
    """Many small leaflets in pairs along a stalk, shorter towards the tip."""
    pairs, blades = int(rng.integers(11, 15)), []
    longest, lean = rng.uniform(0.3, 0.4), rng.uniform(0.15, 0.5)
    veins = [(np.array([(0, -0.2), (0, 1.0)]), 0.02)]
    t = np.linspace(0, 1, 24)
    for k, at in enumerate(np.linspace(0.06, 0.97, pairs)):
        length = longest * min(1.0, 0.55 + 0.2 * k) * (1.04 - at) ** 0.75 + 0.03
        width = 0.42 / pairs * np.sin(np.pi * t**0.7) ** 0.7 * (1 - 0.3 * t)
        for side in (-1, 1):
            a = lean + rng.normal(0, 0.05)
            reach, droop = length * t, 0.12 * length * t**2
            x = np.r_[reach, reach[::-1]] * np.cos(a) - np.r_[width, -width[::-1]] * np.sin(a)
            y = np.r_[reach, reach[::-1]] * np.sin(a) + np.r_[width, -width[::-1]] * np.cos(a)
            blades.append(np.stack([side * x, at + y - np.r_[droop, droop[::-1]]], 1))
            end = 0.85 * length
            veins.append(
                (np.array([(0, at), (side * end * np.cos(a), at + end * np.sin(a))]), 0.007)
            )
    return Leaf(blades, veins)


LEAVES: dict[str, Callable[[Rng], Leaf]] = {
    "fern": fern, "ginkgo": ginkgo, "maple": maple, "oak": oak, "willow": willow,
}  # fmt: skip
