"""Images as people have them, and what is found among them; `docs/images.md` says what is made of
each. All good ones show the same kind of picture, so that it can be looked for in the pixels.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops

SIZE = (48, 32)
ORIENTATION = 0x0112


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture, unlike itself mirrored or turned: lossy formats keep it."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int) -> Callable[[Image.Image], bytes]:
    """A JPEG that is stored turned, and says so."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the camera's top is at the right: stored turned to the left
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[ORIENTATION] = orientation

    def make(image: Image.Image) -> bytes:
        stored = image.transpose(undo[orientation]) if orientation in undo else image
        return encoded(stored, "JPEG", quality=95, exif=exif)

    return make


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, interlace: int = 0) -> bytes:
    """A PNG of kinds that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _rows(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced(image: Image.Image) -> bytes:
    pixels = np.asarray(image)
    passes = (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    )
    rows = b"".join(_rows(pixels[y::dy, x::dx]) for x, y, dx, dy in passes)
    return png(image.size, 8, 2, rows, interlace=1)


def sixteen_bits(image: Image.Image) -> bytes:
    return png(image.size, 16, 2, _rows(np.asarray(image).astype(">u2") * 257))


def cmyk(image: Image.Image) -> bytes:
    return encoded(image.convert("CMYK"), "JPEG", quality=95)


def ycck(image: Image.Image) -> bytes:
    """What Photoshop makes of CMYK: Pillow writes no such file, so its marker is changed."""
    *inks, black = image.convert("CMYK").split()
    luma = Image.merge("RGB", inks).convert("YCbCr")
    stored = Image.merge("CMYK", (*map(ImageChops.invert, luma.split()), black))
    content = bytearray(encoded(stored, "JPEG", quality=95, subsampling=0))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def with_alpha(mode: str, format: str) -> Callable[[Image.Image], bytes]:
    def make(image: Image.Image) -> bytes:
        opaque = image.convert(mode)
        opaque.putalpha(255)
        return encoded(opaque, format)

    return make


def animated(format: str, **options: object) -> Callable[[Image.Image], bytes]:
    """The picture, then others."""

    def make(image: Image.Image) -> bytes:
        others = [ImageChops.invert(image), image.rotate(180)]
        return encoded(image, format, save_all=True, append_images=others, **options)

    return make


def as_format(format: str, mode: str = "RGB", **options: object) -> Callable[[Image.Image], bytes]:
    return lambda image: encoded(image.convert(mode), format, **options)


def floats(image: Image.Image, white: float = 1.0) -> bytes:
    values = np.asarray(image.convert("L"), dtype=np.float32) * (white / 255)
    return encoded(Image.fromarray(values), "TIFF")


GOOD: dict[str, Callable[[Image.Image], bytes]] = {
    **{f"orientation {n}.jpg": turned(n) for n in range(1, 9)},
    "broken exif.png": as_format("PNG", exif=b"Exif\0\0garbage, no TIFF header"),
    "grey.png": as_format("PNG", "L"),
    "grey with alpha.png": with_alpha("L", "PNG"),
    "with alpha.png": with_alpha("RGB", "PNG"),
    "with alpha.webp": with_alpha("RGB", "WEBP"),
    "palette.png": as_format("PNG", "P"),
    "palette with transparency.png": as_format("PNG", "P", transparency=255),
    "one bit.png": as_format("PNG", "1"),
    "cmyk.jpg": cmyk,
    "ycck.jpg": ycck,
    "cmyk.tif": as_format("TIFF", "CMYK"),
    "sixteen bits.png": sixteen_bits,
    "sixteen bits grey.tiff": lambda image: encoded(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "TIFF"
    ),
    "floats up to 1.tif": floats,
    "floats up to 255.tif": lambda image: floats(image, 255),
    "interlaced.png": interlaced,
    "progressive.jpg": as_format("JPEG", quality=95, progressive=True),
    "stereo pair.jpg": animated("MPO", quality=95),
    "animated.gif": animated("GIF"),
    "animated.png": animated("PNG"),
    "animated.apng": animated("PNG", default_image=True),
    "animated.webp": animated("WEBP", quality=95),
    "pages.tif": animated("TIFF"),
    "photo.avif": as_format("AVIF", quality=90),
    "photo.bmp": as_format("BMP"),
    "photo.ppm": as_format("PPM"),
    "photo.jfif": as_format("JPEG", quality=95),
    "PHOTO.JPG": as_format("JPEG", quality=95),
    "a png.jpg": as_format("PNG"),
    "no suffix": as_format("PNG"),
    "it's \"quoted\".png": as_format("PNG"),
    "line\nbreak.png": as_format("PNG"),
    "蜂 ünïcødé 🐝.png": as_format("PNG"),
    "sub folder/x.png": as_format("PNG"),
}  # fmt: skip
"""File name -> picture -> content."""

GREY = {
    "grey.png", "grey with alpha.png", "one bit.png", "sixteen bits grey.tiff",
    "floats up to 1.tif", "floats up to 255.tif",
}  # fmt: skip

WHOLE = encoded(picture(), "JPEG")
HEIC = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heic"

BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "is empty (0 bytes)"),
    "truncated.jpg": (WHOLE[:-40], "is damaged"),
    "truncated.png": (encoded(picture(), "PNG")[:-40], "is damaged"),
    "text.jpg": (b"<html>not found</html>", "is not an image"),
    "no pixels.png": (png((0, 5), 8, 2, b""), "is not an image"),
    "bomb.png": (png((20_000, 20_000), 8, 2, b""), "has more than 178 million pixels"),
    "elevation.tif": (
        encoded(Image.fromarray(np.float32([[-3, 812]])), "TIFF"),
        "has values from -3 to 812",
    ),
    "hole.tif": (encoded(Image.fromarray(np.float32([[0, np.nan]])), "TIFF"), "has values from"),
    "counts.tif": (encoded(Image.fromarray(np.int32([[0, 70000]])), "TIFF"), "to 70000"),
    "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "paper.jpg": (encoded(picture(), "PDF"), "is not an image"),
    "icon.png": (encoded(picture(), "ICO"), "is not an image"),
    "photo.heic": (HEIC, "needs the package pillow-heif"),
    "photo from a phone.jpg": (HEIC, "needs the package pillow-heif"),
    "LICENSE": (b"All rights reserved.", "is not an image"),
    "notes.txt": (b"good", "has no image suffix (.txt)"),
    "photo.SVG": (b"<svg/>", "has no image suffix (.svg)"),
}
"""File name -> (content, part of the reason)."""

IGNORED = (
    ".DS_Store",
    "Thumbs.db",
    "._a png.jpg",
    "__MACOSX/x.png",
    ".cache/x.png",
    "@eaDir/x.jpg",
)
