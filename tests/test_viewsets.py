"""Test-time augmentation: which views an image has."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cnnft.config.texts import view_count
from cnnft.data.images import read_image
from cnnft.data.transforms import InputSpec
from cnnft.data.viewsets import ViewSet
from cnnft.errors import UsageError

SPEC = InputSpec(32, 0.8, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 71, 3), np.uint8)
    return Image.fromarray(pixels)


def reference(image: Image.Image, side: int) -> Iterator[Image.Image]:
    """The corners and the centre, 32 × 32, cut by Pillow one at a time, each from the file's
    pixels."""
    for corner in ("top left", "top right", "bottom left", "bottom right", "centre"):
        width, height = image.size
        scale = side / min(width, height)
        size = int(width * scale), int(height * scale)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        left = {"left": 0, "right": size[0] - 32}.get(corner.split()[-1], round((size[0] - 32) / 2))
        top = {"top": 0, "bottom": size[1] - 32}.get(corner.split()[0], round((size[1] - 32) / 2))
        yield resized.crop((left, top, left + 32, top + 32))


def pixels(crops: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])


def test_ten_crop_is_corners_and_centre_with_reflections(image: Image.Image) -> None:
    *corners, centre = reference(image, 40)
    crops = [centre, *corners]
    crops += [ImageOps.mirror(crop) for crop in crops]
    assert np.array_equal(ViewSet(SPEC, "ten-crop").as_bytes(image), pixels(crops))
    assert np.array_equal(ViewSet(SPEC, "five-crop").as_bytes(image), pixels(crops[:5]))


def test_multiscale_is_ten_crops_at_each_of_five_scales(image: Image.Image) -> None:
    crops = [crop for side in (32, 37, 55, 69, 91) for crop in reference(image, side)]
    crops += [ImageOps.mirror(crop) for crop in crops]
    assert np.array_equal(ViewSet(SPEC, "multiscale").as_bytes(image), pixels(crops))


def test_random_views_depend_on_the_image_alone(image: Image.Image) -> None:
    views = ViewSet(SPEC, "random:4").as_bytes(image)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(ViewSet(SPEC, "random:4").as_bytes(image), views)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ViewSet(SPEC, "random:6").as_bytes(image)[:4], views)
    assert not torch.equal(ViewSet(SPEC, "random:4").as_bytes(ImageOps.mirror(image)), views)
    assert len({bytes(view.numpy().tobytes()) for view in views}) == 4


@pytest.mark.parametrize("name", ["random:0", "random:", "random:-1", "random:1001", "random:x",
                                  "all", "NONE", "", "ten-crop:3"])  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="choose one of none, hflip"):
        view_count(name)


def test_small_images_are_enlarged(tmp_path) -> None:
    Image.new("RGB", (3, 5), (9, 9, 9)).save(tmp_path / "small.png")
    views = ViewSet(SPEC, "multiscale").as_bytes(read_image(tmp_path / "small.png"))
    assert views.shape == (50, 3, 32, 32) and bool((views == 9).all())
