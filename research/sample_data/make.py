"""Write the sample data set: five kinds of leaves on the ground, drawn by this script.

Only the shape of the leaf tells its class. Leaf colour, ground, light and litter are drawn from the
same distributions for every class, so that a classifier must see shape to be right.

Every image is a pure function of (seed, split, class, index): more images, or another class, leave
the existing ones as they are, and two runs with the same Pillow and numpy write identical bytes.
"""

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from research.sample_data.leaf_shapes import LEAVES, Array, Leaf, Rng

Size = tuple[int, int]  # width, height, as Pillow has it

SPLITS = {"train": 64, "val": 24, "test": 24}  # images per class
LONG_SIDE = 160
SUPERSAMPLE = 3  # Pillow draws polygons without anti-aliasing: draw larger, then reduce
JPEG_QUALITY = 85  # keeps the whole set below 3.5 MB

LEAF_COLOURS = np.array([
    (64, 112, 40), (98, 140, 52), (150, 170, 60), (46, 84, 60), (208, 176, 52), (222, 140, 36),
    (196, 84, 32), (170, 40, 40), (116, 46, 62), (132, 88, 48), (168, 132, 86), (112, 130, 104),
]) / 255  # fmt: skip
GROUND_COLOURS = np.array([
    (92, 70, 52), (128, 112, 92), (142, 142, 140), (84, 90, 98), (196, 178, 140), (80, 96, 52),
    (160, 120, 78), (222, 218, 208), (58, 52, 50), (150, 84, 60), (110, 124, 90), (172, 176, 186),
]) / 255  # fmt: skip


def noise(rng: Rng, size: Size, cells: float, octaves: int = 4, gain: float = 0.55) -> Array:
    """Smooth noise in about 0..1: random grids of doubling fineness, enlarged and summed."""
    total, weight = np.zeros(size[::-1]), 1.0
    for octave in range(octaves):
        scale = cells * 2**octave / max(size)
        grid = rng.normal(0, 1, [max(2, round(side * scale) + 1) for side in size[::-1]])
        enlarged = Image.fromarray(grid.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        total += weight * np.asarray(enlarged)
        weight *= gain
    return np.clip(0.5 + total / (4 * total.std()), 0, 1)


def blur(mask: Array, radius: float, shift: tuple[int, int] = (0, 0)) -> Array:
    """Gaussian blur of a 0..1 array, moved right and down by `shift`."""
    image = Image.fromarray((mask * 255).astype(np.uint8)).rotate(0, translate=shift)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float64) / 255


def colour(rng: Rng, palette: Array) -> Array:
    """A palette colour, shifted a little in lightness and in hue."""
    chosen = palette[rng.integers(len(palette))] * rng.uniform(0.75, 1.2)
    return np.clip(chosen + rng.normal(0, 0.03, 3), 0, 1)


@dataclass
class Scene:
    """The picture while it is painted, and what all things in it share: size and light."""

    rng: Rng
    pixels: Array
    light: Array  # direction from which the light comes, in pixels right and down
    softness: float  # radius of shadow edges

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]

    def mask(self, draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Array:
        """Draw shapes in white on black."""
        image = Image.new("L", self.size)
        draw_on(ImageDraw.Draw(image))
        return np.asarray(image, np.float64) / 255

    def lay(
        self, mask: Array, paint: Array, roundness: float, lift: float, furrows: Array | float = 0.0
    ) -> None:
        """Put a thing on the ground: its shadow, then its paint shaded by the slope of its top."""
        away = tuple((-self.light * lift).round().astype(int))
        self.pixels *= 1 - 0.55 * blur(mask, self.softness, away)[..., None]
        height = blur(mask, roundness) * roundness - furrows
        slope_y, slope_x = np.gradient(height)
        shade = np.clip(1 - 0.45 * (slope_x * self.light[0] + slope_y * self.light[1]), 0.5, 1.5)
        shaded = np.clip(paint, 0, 1) * shade[..., None]
        self.pixels += mask[..., None] * (shaded - self.pixels)


def ground(rng: Rng, size: Size) -> Array:
    """One of seven grounds: soil, wood, stone, paving, cloth, sand, leaf litter."""
    first, second = colour(rng, GROUND_COLOURS), colour(rng, GROUND_COLOURS)
    second = first + rng.uniform(0.1, 0.45) * (second - first)
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    coarse, fine = noise(rng, size, 4), noise(rng, size, 40, 3, 0.8)
    kind = rng.integers(7)
    if kind == 0:  # soil
        tone = 0.5 * coarse + 0.7 * fine
    elif kind == 1:  # wood: rings, and the gaps between boards
        rings = np.sin(2 * np.pi * (rng.uniform(8, 20) * u + 1.5 * coarse))
        gaps = (u * rng.uniform(1.5, 4) + rng.uniform()) % 1 < 0.04
        tone = 0.35 + 0.35 * rings + 0.3 * fine - 0.8 * gaps
    elif kind == 2:  # stone: cracks run where the noise crosses its middle
        cracks = np.exp(-(((noise(rng, size, 5) - 0.5) / 0.012) ** 2))
        tone = 0.35 + 0.4 * coarse + 0.3 * fine - 0.6 * cracks
    elif kind == 3:  # paving
        rows, columns = v * rng.uniform(3, 7), u * rng.uniform(1.5, 5)
        columns = columns + 0.5 * (np.floor(rows) % 2)
        seams = np.minimum(np.abs(rows % 1 - 0.5), np.abs(columns % 1 - 0.5)) < 0.06
        bricks = np.sin(9 * np.floor(rows) + 5 * np.floor(columns))
        tone = 0.3 + 0.3 * bricks + 0.6 * fine - 0.6 * seams
    elif kind == 4:  # cloth
        threads = rng.uniform(25, 55) * 2 * np.pi
        tone = 0.25 + 0.22 * (np.sin(threads * u) + np.sin(threads * v)) + 0.5 * coarse
    elif kind == 5:  # sand ripples
        waves = np.sin(2 * np.pi * (rng.uniform(6, 14) * u + 2.2 * coarse))
        tone = 0.3 + 0.35 * waves + 0.4 * fine
    else:  # leaf litter: patches with sharp borders
        tone = np.floor(noise(rng, size, 9, 3) * 7) / 6 + 0.4 * (fine - 0.5)
    return np.clip(first + np.clip(tone, -0.3, 1.3)[..., None] * (second - first), 0, 1)


def lay_scrap(scene: Scene) -> None:
    """Lay a thing that says nothing about the class: twig, pebble, torn piece, blade of grass."""
    rng, unit = scene.rng, max(scene.size)
    kind = rng.choice(("twig", "pebble", "piece", "grass"))
    tint = colour(rng, GROUND_COLOURS if rng.random() < 0.5 else LEAF_COLOURS)
    centre, turn = rng.uniform(0, 1, 2) * scene.size, rng.uniform(0, 2 * np.pi)
    if kind in ("twig", "grass"):
        along = np.linspace(-0.5, 0.5, 24)
        angle = turn + rng.normal(0, 1.2) * along
        steps = np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.2, 0.7) * unit / 24
        points = [tuple(point) for point in centre + np.cumsum(steps, 0)]
        width = int(unit * (rng.uniform(0.012, 0.03) if kind == "twig" else 0.012))
        mask = scene.mask(lambda draw: draw.line(points, fill=255, width=width, joint="curve"))
    else:
        theta = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        waves = np.sin(np.outer((2, 3, 5, 8), theta) + rng.uniform(0, 6, (4, 1)))
        wobble = rng.normal(0, 0.02 if kind == "pebble" else 0.1, 4) @ waves
        radius = unit * rng.uniform(0.03, 0.1) * (1 + wobble)
        x, y = radius * np.cos(theta + turn), radius * rng.uniform(0.5, 1) * np.sin(theta + turn)
        points = [tuple(point) for point in centre + np.stack([x, y], 1)]
        mask = scene.mask(lambda draw: draw.polygon(points, fill=255))
    paint = tint * (0.7 + 0.6 * noise(rng, scene.size, 30, 2)[..., None])
    scene.lay(mask, paint, unit * (0.02 if kind == "pebble" else 0.006), lift=4)


def lay_leaf(scene: Scene, leaf: Leaf, scale: float, centre: Array) -> None:
    """Bend, tilt, turn and place a leaf, then paint blade and veins."""
    rng, unit = scene.rng, max(scene.size)
    bend, turn, tilt = rng.normal(0, 0.25), np.pi + rng.uniform(-0.9, 0.9), rng.uniform(0.72, 1)
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

    def place(points: Array) -> list[tuple[float, float]]:
        x, y = points[:, 0] * tilt, points[:, 1] - 0.5
        bent = np.stack([x * np.cos(bend * y) + 0.5 * bend * y**2, y - x * np.sin(bend * y)], 1)
        return [tuple(p) for p in bent @ turned * scale * unit + centre]

    def draw_veins(draw: ImageDraw.ImageDraw) -> None:
        for points, width in leaf.veins:
            thick = max(2, round(width * scale * unit))
            draw.line(place(points), fill=255, width=thick, joint="curve")

    blade = scene.mask(lambda d: [d.polygon(place(blade), fill=255) for blade in leaf.blades])
    veins = scene.mask(draw_veins)
    behind = scene.pixels.mean((0, 1))
    base, other = colour(rng, LEAF_COLOURS), colour(rng, LEAF_COLOURS)
    while np.abs(base - behind).sum() < 0.5:  # a leaf in the colour of the ground cannot be seen
        base = np.clip(colour(rng, LEAF_COLOURS) * rng.uniform(0.6, 1.3), 0, 1)
    spots = np.clip((noise(rng, scene.size, rng.uniform(3, 12)) - rng.uniform(0.4, 0.9)) * 5, 0, 1)
    paint = base + (rng.uniform(0.1, 0.7) * spots)[..., None] * (other - base)
    paint = paint * (0.85 + 0.3 * noise(rng, scene.size, 25, 3))[..., None]
    paint = paint * (0.8 + 0.2 * blur(blade, unit * 0.012))[..., None]  # darker rim
    line = blur(veins, 1.2)[..., None] * rng.uniform(0.35, 0.8)
    paint = paint + line * (np.clip(base * rng.uniform(0.5, 1.6), 0, 1) - paint)
    mask = np.maximum(blade, veins)  # the stalk is a vein outside the blade
    scene.lay(mask, paint, unit * 0.012, rng.uniform(4, 14), furrows=2 * blur(veins, 2.5))


def draw_image(seed: int, split: str, name: str, index: int) -> Image.Image:
    """The image with this key."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{name}".encode()), index])
    sides = np.array([LONG_SIDE, round(LONG_SIDE * rng.uniform(0.72, 1))])[:: rng.choice((-1, 1))]
    width, height = (int(side) * SUPERSAMPLE for side in sides)
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(angle), np.sin(angle)])
    scene = Scene(rng, ground(rng, (width, height)), light, rng.uniform(2, 7))
    for _ in range(rng.integers(1, 6)):
        lay_scrap(scene)
    centre = rng.uniform(0.42, 0.58, 2) * scene.size
    lay_leaf(scene, LEAVES[name](rng), rng.uniform(0.58, 0.92), centre)
    for _ in range(rng.integers(0, 2)):  # some litter lies on the leaf
        lay_scrap(scene)
    y, x = np.mgrid[:height, :width] / LONG_SIDE / SUPERSAMPLE - 0.5
    exposure = rng.uniform(0.75, 1.1) * (1 + rng.uniform(0, 0.7) * (x * light[0] + y * light[1]))
    if rng.random() < 0.4:  # dappled shade
        shade = np.clip((noise(rng, scene.size, 3, 2) - 0.5) * 6, 0, 1)
        exposure = exposure * (1 - rng.uniform(0.2, 0.5) * shade)
    cast = 1 + rng.normal(0, 0.06, 3)
    pixels = np.clip(scene.pixels * exposure[..., None] * cast, 0, 1)
    return Image.fromarray((pixels * 255).astype(np.uint8)).reduce(SUPERSAMPLE)


def contact_sheet(seed: int, columns: int = 9, cell: int = 100) -> Image.Image:
    """One row per class, from the training images."""
    sheet = Image.new("RGB", (columns * cell, len(LEAVES) * cell))
    for row, name in enumerate(LEAVES):
        for index in range(columns):
            image = draw_image(seed, "train", name, index)
            sheet.paste(ImageOps.fit(image, (cell, cell)), (index * cell, row * cell))
    return sheet


def main() -> None:
    """Write the data set, and the contact sheet where it is asked for."""
    parser = argparse.ArgumentParser(description="Draw the sample data set: five kinds of leaves.")
    add = parser.add_argument
    add("--output", type=Path, default=Path("sample_data"), help="folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other images (default: %(default)s)")
    add("--sheet", type=Path, metavar="FILE", help="write only a contact sheet, to FILE")
    options = parser.parse_args()
    if options.sheet:
        contact_sheet(options.seed).save(options.sheet, quality=80)
        return
    total = 0
    for split, count in SPLITS.items():
        for name in LEAVES:
            folder = options.output / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                path = folder / f"{name}_{index:03d}.jpg"
                image = draw_image(options.seed, split, name, index)
                image.save(path, quality=JPEG_QUALITY, optimize=True)
                total += path.stat().st_size
    print(f"{options.output}: {sum(SPLITS.values()) * len(LEAVES)} images, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
