"""Which pictures are called the same, and which are not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from cnnft.data.nearduplicates import near_duplicates, stars, thumbnail

Change = Callable[[Image.Image], Image.Image]


def scene(seed: int) -> Image.Image:
    """Blots on a slope of brightness, 240 × 180."""
    random = np.random.default_rng(seed)
    blots = Image.fromarray(random.integers(0, 220, (9, 12, 3), dtype=np.uint8))
    shade = np.linspace(0.6, 1.0, 240)[None, :, None]
    pixels = np.asarray(blots.resize((240, 180), Image.Resampling.BICUBIC)) * shade
    return Image.fromarray(pixels.astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without so much of each edge."""
    width, height = image.size
    x, y = round(width * share), round(height * share)
    return image.crop((x, y, width - x, height - y))


SAME: dict[str, Change] = {
    "JPEG of quality 30": lambda image: jpeg(image, 30),
    "a third of the size": lambda image: image.resize((80, 60)),
    "twice the size": lambda image: image.resize((480, 360)),
    "another shape": lambda image: image.resize((200, 200)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "cropped": lambda image: cropped(image, 0.02),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "all of it": lambda image: jpeg(
        ImageEnhance.Brightness(cropped(image, 0.01)).enhance(1.1).resize((120, 90)), 60
    ),
}


def with_a_spot(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).ellipse((100, 80, 120, 100), fill="white")
    return image


OTHER: dict[str, Change] = {
    "mirrored": ImageOps.mirror,
    "upside down": lambda image: image.rotate(180),
    "recoloured": lambda image: Image.merge("RGB", [image.getchannel(c) for c in "GBR"]),
    "without colour": lambda image: image.convert("L").convert("RGB"),
    "negative": ImageOps.invert,
    "another scene": lambda image: scene(100 + image.getpixel((120, 90))[0]),
    "with an object in it": with_a_spot,
    "half of it": lambda image: cropped(image, 0.25),
}


def found(images: list[Image.Image]) -> list[tuple[int, int]]:
    return near_duplicates([thumbnail(image) for image in images])


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_a_copy_is_found_among_others(change: Change) -> None:
    scenes = [scene(n) for n in range(8)]
    assert found(scenes) == []
    copies = [change(image) for image in scenes]
    assert found(scenes + copies) == [(n, n + 8) for n in range(8)]


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_another_picture_is_none(change: Change) -> None:
    scenes = [scene(n) for n in range(8)]
    assert found(scenes + [change(image.copy()) for image in scenes[:4]]) == []


def test_blank_pictures_are_not_compared() -> None:
    random = np.random.default_rng(0)
    noise = [random.normal(200, 5, (90, 120, 3)).clip(0, 255).astype(np.uint8) for _ in range(20)]
    assert found([*map(Image.fromarray, noise), *(Image.new("RGB", (9, 9), "red"),) * 2]) == []
    assert found([]) == found([scene(0)]) == []


def test_of_many_that_look_the_same_not_all_pairs_are_kept() -> None:
    """Every one is in a pair all the same, and the last with the first."""
    thumbnails = [thumbnail(scene(0))] * 120 + [thumbnail(scene(1))] * 2
    pairs = near_duplicates(thumbnails)
    assert len(pairs) < 120 * 119 / 2
    assert {i for pair in pairs for i in pair} == set(range(122))
    assert (0, 119) in pairs and (120, 121) in pairs


def test_stars_glue_no_chain() -> None:
    assert stars([]) == []
    assert stars([(0, 1), (1, 2)]) == [(1, 0, 2)]
    chain = [(n, n + 1) for n in range(100)]
    groups = stars(chain)
    assert {i for group in groups for i in group} == set(range(101))
    for centre, *others in groups:
        assert others and all(abs(centre - other) == 1 for other in others)
