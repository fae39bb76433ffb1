"""The bank: masks and textures rendered once from a seed, with labels, cached as one .npz file."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import contours, figures, textures
from .canvas import Array, Canvas, Shape

KINDS: tuple[Callable[..., Shape], ...] = (
    contours.polygon,
    contours.star,
    contours.blob,
    contours.superformula,
    contours.rosette,
    contours.leaf,
    contours.nested,
    figures.creature,
    figures.branching,
    figures.glyph,
    figures.cluster,
    figures.fractal,
)
RINGS, HARMONICS = 8, 12
DESCRIPTORS = RINGS + HARMONICS + 2


@dataclass(frozen=True)
class BankSpec:
    """How many identities and variants; every number that the cached file depends on."""

    seed: int = 0
    shapes: int = 960
    shape_variants: int = 8
    textures: int = 480
    texture_variants: int = 12
    size: int = 128

    def filename(self) -> str:
        return "bank-v1-" + "-".join(str(v) for v in asdict(self).values()) + ".npz"


@dataclass(frozen=True)
class Bank:
    """Rendered fields (uint8) and labels. S shapes, T textures, V variants of each."""

    masks: Array
    """(S, V, 3, size, size): coverage, relief, part."""
    textures: Array
    """(T, V, size, size)."""
    kind: Array
    """(S,) index into KINDS."""
    lobes: Array
    """(S,) count, 0 where it does not apply."""
    hollow: Array
    """(S,) 0 or 1."""
    descriptors: Array
    """(S, V, DESCRIPTORS) float32, standardised over the bank."""
    family: Array
    """(T,) index into textures.FAMILIES."""


def describe(coverage: Array) -> Array:
    """What translation, rotation, scaling and mirroring leave of a shape: (DESCRIPTORS,).

    A polar Fourier descriptor in the manner of Zhang & Lu (2002): the coverage is resampled round
    its centroid in units of its root-mean-square radius; the mean of each ring and the strength of
    each angular harmonic remain. Then log elongation (ratio of principal axes) and log
    perimeter^2 / area.
    """
    size = coverage.shape[0]
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    mass = coverage.sum() + 1e-6
    cx, cy = (coverage * x).sum() / mass, (coverage * y).sum() / mass
    offsets = np.stack([x - cx, y - cy])
    moments = np.einsum("hw,ihw,jhw->ij", coverage, offsets, offsets) / mass
    minor, major = np.linalg.eigvalsh(moments) + 1e-4
    radii = np.sqrt(minor + major) * np.linspace(0.2, 1.8, RINGS)[:, None]
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)[None]
    columns = ((cx + radii * np.cos(angles) + 1) / 2 * size).astype(int)
    rows = ((cy + radii * np.sin(angles) + 1) / 2 * size).astype(int)
    inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    rings = coverage[rows.clip(0, size - 1), columns.clip(0, size - 1)] * inside
    harmonics = np.abs(np.fft.rfft(rings, axis=1))[:, 1 : HARMONICS + 1] / 64
    strength = np.log(np.sqrt((harmonics**2).mean(0)) + 0.01)
    gradient = np.hypot(*np.gradient(coverage)).sum() * 2 / size
    compactness = np.log(gradient**2 / (mass * 4 / size**2) + 1)
    return np.concatenate([rings.mean(1), strength, [np.log(major / minor) / 2, compactness]])


def _shape(job: tuple[BankSpec, int]) -> tuple[Array, Array, int, bool]:
    spec, index = job
    canvas, seed = Canvas(spec.size), (spec.seed, 1, index)
    drawn = []
    for variant in range(spec.shape_variants):
        rngs = np.random.default_rng(seed), np.random.default_rng((*seed, variant))
        drawn.append(KINDS[index % len(KINDS)](canvas, *rngs))
    fields = np.stack([[s.coverage, s.relief, s.part] for s in drawn])
    descriptors = np.stack([describe(s.coverage) for s in drawn]).astype(np.float32)
    return _bytes(fields), descriptors, drawn[0].lobes, drawn[0].hollow


def _texture(job: tuple[BankSpec, int]) -> Array:
    spec, index = job
    seed, family = spec.seed * 1_000_003 + index, index % len(textures.FAMILIES)
    samples = range(spec.texture_variants)
    return _bytes(np.stack([textures.texture(family, seed, v, spec.size) for v in samples]))


def _bytes(field: Array) -> Array:
    return np.round(np.clip(field, 0, 1) * 255).astype(np.uint8)


def render(spec: BankSpec, workers: int = 1) -> Bank:
    """Draw everything. About two minutes on two cores for the default spec."""
    shape_jobs = [(spec, i) for i in range(spec.shapes)]
    texture_jobs = [(spec, i) for i in range(spec.textures)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            shapes = list(pool.map(_shape, shape_jobs, chunksize=8))
            tiles = list(pool.map(_texture, texture_jobs, chunksize=8))
    else:
        shapes, tiles = [_shape(j) for j in shape_jobs], [_texture(j) for j in texture_jobs]
    raw = np.stack([s[1] for s in shapes])
    mean, deviation = raw.mean((0, 1)), raw.std((0, 1)) + 1e-6
    return Bank(
        masks=np.stack([s[0] for s in shapes]),
        textures=np.stack(tiles),
        kind=np.arange(spec.shapes) % len(KINDS),
        lobes=np.array([s[2] for s in shapes]),
        hollow=np.array([int(s[3]) for s in shapes]),
        descriptors=((raw - mean) / deviation).clip(-3, 3).astype(np.float32),
        family=np.arange(spec.textures) % len(textures.FAMILIES),
    )


def load(spec: BankSpec, folder: Path, workers: int = 1) -> Bank:
    """The bank from `folder`, rendered there first if it is missing."""
    path = folder / spec.filename()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **asdict(render(spec, workers)))
        partial.replace(path)
    with np.load(path) as stored:
        return Bank(**{name: stored[name] for name in stored.files})
