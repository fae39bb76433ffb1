"""Files of every mode and every kind of damage -> upright RGB pixels, or a reason."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oddities import BAD, GOOD, GREY, HEIC, WHOLE, picture
from PIL import Image

from cnnft.data import images
from cnnft.data.augmentation import training_transform
from cnnft.data.images import SUFFIXES, ImageError, find_problem, read_image
from cnnft.data.names import unsuited
from cnnft.data.transforms import InputSpec
from cnnft.data.viewsets import ViewSet
from cnnft.errors import CnnftError

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(size: tuple[int, int] = (48, 32)) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# ---------------------------------------------------------------- orientation and modes

EXIF_UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", EXIF_UNDO)
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x{suffix}", stored, exif=exif)
    assert np.array_equal(pixels(path), EXIF_UNDO[orientation](np.asarray(stored)))


def test_a_rotated_jpeg_is_upright(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 80), BLACK)
    upright.paste(WHITE, (0, 0, 40, 40))  # sky above, ground below
    exif = Image.Exif()
    exif[0x0112] = 6  # what a phone held upright stores
    path = save(tmp_path / "x.jpg", upright.rotate(90, expand=True), exif=exif)
    found = pixels(path)
    assert found.shape == (80, 40, 3)
    assert found[10, 20].min() > 240 and found[70, 20].max() < 15


def test_transparent_pixels_show_white_and_half_transparent_ones_mix(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (*RED, alpha))
    solid, half, clear = pixels(save(tmp_path / "x.png", image))[0]
    assert tuple(solid) == RED and tuple(clear) == WHITE
    assert half[0] == 255 and half[1] == half[2] and abs(int(half[1]) - 127) <= 1


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (100, 255))
    image.putpixel((1, 0), (100, 0))
    assert pixels(save(tmp_path / "x.png", image)).tolist() == [[[100] * 3, [255] * 3]]


@pytest.mark.parametrize("transparent", [None, 1])
def test_palette_with_and_without_a_transparent_colour(
    tmp_path: Path, transparent: int | None
) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    options = {} if transparent is None else {"transparency": transparent}
    first, second = pixels(save(tmp_path / "x.png", image, **options))[0].tolist()
    assert tuple(first) == RED
    assert tuple(second) == ((0, 0, 255) if transparent is None else WHITE)


def test_a_colour_named_transparent_in_rgb_shows_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), BLACK)
    image.putpixel((0, 0), RED)
    path = save(tmp_path / "x.png", image, transparency=BLACK)
    assert [tuple(p) for p in pixels(path)[0].tolist()] == [RED, WHITE]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_keep_their_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"x{suffix}", Image.fromarray(values))
    assert pixels(path)[0, :, 0].tolist() == [0, 64, 128, 255]


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(save(tmp_path / "x.png", image)).tolist() == [[[0] * 3, [255] * 3]]


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    assert pixels(save(tmp_path / "x.png", Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_file_shows_its_picture(tmp_path: Path, name: str) -> None:
    expected = picture(1)
    path = tmp_path / name.replace("/", " ")
    path.write_bytes(GOOD[name](expected))
    assert find_problem(path, path.read_bytes()) is None
    found = read_image(path)
    if name in GREY:
        expected = expected.convert("L")
    if name == "one bit.png":  # dithered: right on average
        found, expected = found.reduce(8), expected.reduce(8)
    expected = expected.convert("RGB")
    assert found.mode == "RGB" and found.size == expected.size
    difference = np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float))
    assert difference.mean() < (25 if "palette" in name or "one bit" in name else 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 200)])
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("tta", ["none", "ten-crop"])
def test_the_longest_images_become_views_of_bounded_size(
    size: tuple[int, int], fit: str, tta: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **more: object) -> object:
        largest.append(size[0] * size[1])
        return resize(self, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    spec = InputSpec(32, 0.875, "bilinear", (0.5,) * 3, (0.5,) * 3, fit)
    image = Image.new("RGB", size, RED)
    views = ViewSet(spec, tta)(image)
    assert views.shape[1:] == training_transform(spec)(image).shape == (3, 32, 32)
    assert max(largest) <= 51 * 37**2


# ---------------------------------------------------------------- damage


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def bomb(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(path, noise())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # an error from twice that; this has 1536
    return path


def text(path: Path) -> Path:
    path.write_text("<html>not found</html>")
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


Make = Callable[[Path, pytest.MonkeyPatch], Path]
DAMAGED: dict[str, tuple[Make, str]] = {
    "half a jpeg": (lambda f, m: cut(save(f / "x.jpg", noise()), 0.5), "damaged"),
    "nearly a whole jpeg": (lambda f, m: cut(save(f / "x.jpg", noise()), 0.95), "damaged"),
    "half a progressive jpeg": (
        lambda f, m: cut(save(f / "x.jpeg", noise(), progressive=True), 0.5),
        "damaged",
    ),
    "half a png": (lambda f, m: cut(save(f / "x.png", noise()), 0.5), "damaged"),
    "a tenth of a webp": (lambda f, m: cut(save(f / "x.webp", noise()), 0.1), ""),
    "half a bmp": (lambda f, m: cut(save(f / "x.bmp", noise()), 0.5), "damaged"),
    "half a gif": (lambda f, m: cut(save(f / "x.gif", noise()), 0.5), "damaged"),
    "half a tiff": (lambda f, m: cut(save(f / "x.tif", noise()), 0.5), ""),
    "an empty file": (lambda f, m: empty(f / "x.jpg"), "empty (0 bytes)"),
    "text named jpg": (lambda f, m: text(f / "x.jpg"), "not an image"),
    "a png bomb": (lambda f, m: bomb(f / "x.png", m), "million pixels"),
    "a jpeg bomb": (lambda f, m: bomb(f / "x.jpg", m), "million pixels"),
}


@pytest.mark.parametrize(("make", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_sentence_and_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, reason: str
) -> None:
    path = make(tmp_path, monkeypatch)
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert isinstance(raised.value, CnnftError)
    assert str(path) in str(raised.value) and reason in raised.value.reason
    assert "\n" not in raised.value.reason
    assert find_problem(path, path.read_bytes()) == raised.value.reason


@pytest.mark.parametrize("progressive", [False, True])
def test_quick_check_and_full_read_agree_on_a_jpeg_cut_anywhere(
    tmp_path: Path, progressive: bool
) -> None:
    path = save(tmp_path / "x.jpg", noise(), progressive=progressive)
    content = path.read_bytes()
    assert find_problem(path, content) is None
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError) as raised:
            read_image(path)
        assert find_problem(path, content[:length]) == raised.value.reason, length


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(images, "opens_heic", lambda: False)
    content, part = BAD[name]
    if "suffix" in part:
        assert unsuited(name) == part
        return
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError) as raised:
        read_image(path)
    assert part in raised.value.reason and "\n" not in raised.value.reason
    assert find_problem(path, content) == raised.value.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x", None), ("x.", None), ("x.JPeG", None), ("x.tar.png", None), ("x.png.bak", ".bak")],
)
def test_a_suffix_decides_what_is_opened(name: str, reason: str | None) -> None:
    assert unsuited(name) == (reason and f"has no image suffix ({reason})")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:  # root may read everything, so the mode would not do
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (tmp_path / "x.jpg").write_bytes(WHOLE)
    with pytest.raises(ImageError, match=r"x.jpg: cannot be read \(Permission denied\)"):
        read_image(tmp_path / "x.jpg")


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.tif").open("wb") as file:
        file.truncate(2 * 1024**3 + 1)  # takes no room on the disk
    with pytest.raises(ImageError, match=r"x.tif: has more than 2 GiB"):
        read_image(tmp_path / "x.tif")


@pytest.fixture
def heic_anew():
    images.opens_heic.cache_clear()
    yield
    images.opens_heic.cache_clear()


@pytest.mark.usefixtures("heic_anew")
def test_heic_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reason = find_problem("x.heic", HEIC)
    assert reason is not None and "pillow-heif" in reason and "cnnft[heic]" in reason


@pytest.mark.usefixtures("heic_anew")
def test_heic_is_read_where_the_package_is(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs cnnft[heic]")
    path = tmp_path / "x.heic"
    pillow_heif.from_pillow(picture()).save(path, quality=95)
    difference = np.abs(pixels(path).astype(float) - np.asarray(picture(), dtype=float))
    assert difference.mean() < 4
    assert "is damaged" in (find_problem(path, path.read_bytes()[:-40]) or "")


def test_a_missing_file_and_a_folder_are_image_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(ImageError, match=r"cannot be read|is not a regular file") as raised:
            read_image(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES - {".heic", ".heif"}))
def test_every_suffix_that_is_listed_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x{suffix}", noise())
    assert find_problem(path, path.read_bytes()) is None
    assert pixels(path).shape == (32, 48, 3)
