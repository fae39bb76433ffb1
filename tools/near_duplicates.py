"""Plant altered copies among real photographs, and count which of them are found.

    python -m tools.near_duplicates --data DIR   fills docs/near-duplicates.md; DIR holds data sets
    python -m tools.near_duplicates --data DIR --pairs OUT   draws what is found without copies

A miss is a copy that is not called the same picture as its original. What is found among the
originals themselves is drawn, for a person to judge; pictures that were made to be hard are judged
by how they were made.
"""

import argparse
import io
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from cnnft.data.images import read_image
from cnnft.data.nearduplicates import SIZE, Thumbnail, near_duplicates, stars, thumbnail
from tools.document import fill

DOCUMENT = Path(__file__).parents[1] / "docs" / "near-duplicates.md"
SEED = 0
_SIDE = 200  # pixels, in drawn pairs

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, quality: int = 90) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    size = [max(1, round(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def brightened(image: Image.Image, factor: float) -> Image.Image:
    return jpeg(ImageEnhance.Brightness(image).enhance(factor))


def cropped(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """Without `share` of width and height, taken from both sides at random."""
    width, height = image.size
    across, down = round(width * share), round(height * share)
    left, top = int(random.integers(0, across + 1)), int(random.integers(0, down + 1))
    return jpeg(image.crop((left, top, width - across + left, height - down + top)))


def all_at_once(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return jpeg(scaled(brightened(cropped(image, 0.02, random), 1.15), 0.5), 50)


def recoloured(image: Image.Image) -> Image.Image:
    return Image.merge("RGB", [image.getchannel(channel) for channel in "GBR"])


COPIES: dict[str, Change] = {
    "JPEG, quality 30": lambda image, _: jpeg(image, 30),
    "JPEG, quality 50": lambda image, _: jpeg(image, 50),
    "JPEG, quality 90": lambda image, _: jpeg(image, 90),
    "PNG, 0.3 times as large": lambda image, _: scaled(image, 0.3),
    "PNG, half as large": lambda image, _: scaled(image, 0.5),
    "PNG, twice as large": lambda image, _: scaled(image, 2),
    "brighter by 10 %": lambda image, _: brightened(image, 1.1),
    "brighter by 20 %": lambda image, _: brightened(image, 1.2),
    "darker by 10 %": lambda image, _: brightened(image, 0.9),
    "darker by 20 %": lambda image, _: brightened(image, 0.8),
    "cropped by 2 %, anywhere": lambda image, random: cropped(image, 0.02, random),
    "cropped by 4 %, anywhere": lambda image, random: cropped(image, 0.04, random),
    "blurred, radius 1 px": lambda image, _: jpeg(image.filter(ImageFilter.GaussianBlur(1))),
    "cropped by 2 %, brighter by 15 %, half as large, quality 50": all_at_once,
}
OTHERS: dict[str, Change] = {
    "mirrored": lambda image, _: ImageOps.mirror(image),
    "channels exchanged": lambda image, _: recoloured(image),
    "without colour": lambda image, _: image.convert("L").convert("RGB"),
}


# ---------------------------------------------------------------- pictures that are hard


def noisy(image: Image.Image, random: np.random.Generator, deviation: float = 3) -> Image.Image:
    pixels = np.asarray(image) + random.normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def blots(random: np.random.Generator, size: tuple[int, int], grain: int) -> Image.Image:
    cells = random.integers(60, 200, (size[1] // grain, size[0] // grain, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def words(random: np.random.Generator, count: int) -> str:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return " ".join("".join(random.choice(letters, random.integers(2, 9))) for _ in range(count))


def digits(_: np.random.Generator) -> Iterator[Image.Image]:
    from sklearn.datasets import load_digits

    for digit in load_digits().images:
        small = Image.fromarray((digit * 15.9).astype(np.uint8))
        yield small.resize((28, 28), Image.Resampling.BICUBIC).convert("RGB")


def pages(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        page = Image.new("RGB", (480, 640), "white")
        for line in range(40):
            ImageDraw.Draw(page).text((40, 30 + 14 * line), words(random, 10)[:66], fill="black")
        yield page


def screenshots(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        screen = Image.new("RGB", (640, 480), (245, 245, 245))
        draw = ImageDraw.Draw(screen)
        draw.rectangle((0, 0, 640, 40), fill=(40, 60, 120))
        draw.rectangle((0, 40, 140, 480), fill=(220, 225, 235))
        for line in range(random.integers(3, 20)):
            draw.text((160, 60 + 20 * line), words(random, random.integers(3, 12)), fill="black")
        yield screen


def conveyor(random: np.random.Generator) -> Iterator[Image.Image]:
    belt = blots(random, (640, 480), 20)
    for _ in range(300):
        photo, (x, y) = belt.copy(), random.integers(80, 400, 2)
        colour = tuple(random.integers(0, 255, 3).tolist())
        ImageDraw.Draw(photo).ellipse((x - 24, y - 24, x + 24, y + 24), fill=colour)
        yield noisy(photo, random)


def labels(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        product = Image.new("RGB", (300, 300), "white")
        draw = ImageDraw.Draw(product)
        draw.rounded_rectangle((100, 50, 200, 270), 20, fill=(200, 30, 30))
        draw.text((125, 150), words(random, 1), fill="white")
        yield product


def microscopy(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        slide = Image.new("RGB", (400, 400), (235, 225, 240))
        for _ in range(random.integers(5, 60)):
            (x, y), radius = random.integers(0, 400, 2), random.integers(4, 14)
            box = (x - radius, y - radius, x + radius, y + radius)
            ImageDraw.Draw(slide).ellipse(box, fill=(120, 60, 140))
        yield noisy(slide.filter(ImageFilter.GaussianBlur(1)), random)


def plain(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        colour = tuple(random.integers(0, 255, 3).tolist())
        yield noisy(Image.new("RGB", (300, 200), colour), random, 6)


def borders(random: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(300):
        framed = Image.new("RGB", (320, 240), "black")
        framed.paste(blots(random, (160, 120), 20), (80, 60))
        yield framed


def colours(random: np.random.Generator) -> Iterator[Image.Image]:
    """Each shape in green and in red."""
    for _ in range(150):
        shape = random.random((6, 6, 1)) > 0.5
        for colour in ((60, 170, 60), (200, 60, 60)):
            pixels = np.where(shape, colour, 240).astype(np.uint8)
            yield Image.fromarray(pixels.repeat(16, 0).repeat(16, 1))


HARD: dict[str, Callable[[np.random.Generator], Iterator[Image.Image]]] = {
    "handwritten digits (scikit-learn), 28 px": digits,
    "pages of text": pages,
    "one window with different text": screenshots,
    "one belt with a disc of 48 px elsewhere, in another colour": conveyor,
    "one product with another word of 10 px on it": labels,
    "cells on a pale ground": microscopy,
    "plain colours with noise": plain,
    "a black border around half of the picture": borders,
    "shapes in green and in red": colours,
}


# ---------------------------------------------------------------- counting


class Measured:
    """What is found in one data set with planted copies."""

    def __init__(self, folder: Path, count: int) -> None:
        self.name = folder.name
        self.paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.originals = [thumbnail(read_image(path)) for path in self.paths]
        began = time.process_time()
        self.found = near_duplicates(self.originals)
        self.seconds = time.process_time() - began
        random = np.random.default_rng(SEED)
        train = [i for i, path in enumerate(self.paths) if "train" in path.parts] or [*range(count)]
        chosen = random.choice(train, min(count, len(train)), replace=False)
        self.chosen = sorted(int(index) for index in chosen)
        self.copies: dict[str, list[Thumbnail]] = {name: [] for name in COPIES | OTHERS}
        for index in self.chosen:
            image = read_image(self.paths[index])
            for name, change in (COPIES | OTHERS).items():
                self.copies[name].append(thumbnail(change(image, random)))

    def found_copies(self, name: str) -> int:
        """How many copies are in a pair with their original."""
        first = len(self.originals)
        pairs = set(near_duplicates(self.originals + self.copies[name]))
        return sum((index, first + n) in pairs for n, index in enumerate(self.chosen))

    def strangers(self) -> int:
        """Pairs of a copy and another image, whose originals are not called the same."""
        first, known, strange = len(self.originals), set(self.found), 0
        for name in COPIES:
            for i, j in near_duplicates(self.originals + self.copies[name]):
                if i < first <= j:
                    other = self.chosen[j - first]
                    strange += i != other and (min(i, other), max(i, other)) not in known
        return strange

    def draw(self, folder: Path) -> None:
        """The pairs among the originals side by side."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, pair in enumerate(self.found):
            sheet = Image.new("RGB", (2 * _SIDE, _SIDE))
            for place, index in enumerate(pair):
                sheet.paste(
                    read_image(self.paths[index]).resize((_SIDE, _SIDE)), (place * _SIDE, 0)
                )
            sheet.save(folder / f"{self.name}-{number:03d}.png")


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def of_copies(sets: list[Measured]) -> str:
    """Missed copies, and what is found that should not be."""
    header = ["copy", *(f"{part.name} ({len(part.chosen)})" for part in sets)]
    rows: list[list[object]] = []
    for name in COPIES:
        rows.append([name, *(len(part.chosen) - part.found_copies(name) for part in sets)])
    for name in OTHERS:
        rows.append([f"*called the same:* {name}", *(part.found_copies(name) for part in sets)])
    rows.append(["*called the same:* a copy of another image", *(s.strangers() for s in sets)])
    rows.append(["images", *(len(part.originals) for part in sets)])
    rows.append(["pairs found among the originals", *(len(part.found) for part in sets)])
    return table(header, rows)


def of_hard_pictures() -> str:
    rows: list[list[object]] = []
    for name, make in HARD.items():
        thumbnails = [thumbnail(image) for image in make(np.random.default_rng(SEED))]
        pairs = near_duplicates(thumbnails)
        all_pairs = len(thumbnails) * (len(thumbnails) - 1) // 2
        rows.append([name, len(thumbnails), f"{all_pairs:,}", len(pairs), len(stars(pairs))])
    return table(["pictures", "images", "pairs", "called the same", "groups"], rows)


def of_many(count: int) -> str:
    """How long `count` unlike pictures take beyond decoding."""
    torch.manual_seed(SEED)
    parts = [
        F.interpolate(255 * torch.rand(1000, 3, 8, 8), SIZE, mode="bicubic").clamp(0, 255)
        for _ in range(count // 1000)
    ]
    thumbnails = list(torch.cat(parts).permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy())
    began, computed = time.monotonic(), time.process_time()
    near_duplicates(thumbnails)
    return (
        f"{count:,} unlike pictures take {time.process_time() - computed:.0f} s of one processor "
        f"({time.monotonic() - began:.0f} s on this machine, whose others were in use), and "
        f"{count * SIZE * SIZE * 3 / 1e6:,.0f} MB for the thumbnails."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--count", type=int, default=150, help="images of each that are copied")
    parser.add_argument("--pairs", type=Path, help="draw the pairs found among originals there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(path for path in arguments.data.iterdir() if path.is_dir())
    sets = [Measured(folder, arguments.count) for folder in folders]
    if arguments.pairs:
        for part in sets:
            part.draw(arguments.pairs)
        return
    machine = f"Seed {SEED}, one thread, {platform.machine()}, Python {platform.python_version()}."
    fill(DOCUMENT, "copies", f"{of_copies(sets)}\n\n{machine}")
    fill(DOCUMENT, "hard", of_hard_pictures())
    fill(DOCUMENT, "time", of_many(100_000))


if __name__ == "__main__":
    main()
