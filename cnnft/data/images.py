"""Decoding: the bytes of a file -> upright RGB pixels, or one sentence about why not."""

import io
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from cnnft.config.choices import Decoder
from cnnft.errors import CnnftError, first_line

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm"}
)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""No other decoder of Pillow's is opened: one starts Ghostscript, many are hardly ever tested."""

_HEIC = re.compile(rb".{4}ftyp.{0,32}hei[cxms]", re.DOTALL)

_BACKGROUND = (255, 255, 255)
"""Transparent pixels show white, as on a page."""

_MOST_BYTES = 2 * 1024**3
"""More than the largest image that Pillow opens has without compression (8 bytes per pixel)."""


@dataclass(frozen=True)
class PixelSpec:
    """Which pixels a file is read as: `FULL`, all that are in it, or a reduced copy."""

    short_side: int | None = None
    """Pixels. Where the shorter side is longer than that, the image is reduced (bicubic,
    antialiased)."""
    decoder: Decoder = "pillow"
    """draft: libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size where that leaves `short_side`
    or more: faster, and other pixels."""

    def reduced(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of what an image of that size is read as."""
        if self.short_side is None or min(width, height) <= self.short_side:
            return width, height
        scale = self.short_side / min(width, height)
        return round(width * scale), round(height * scale)


FULL = PixelSpec()


class ImageError(CnnftError):
    """A file that cannot be read as an image; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def read_image(path: str | Path, pixels: PixelSpec = FULL) -> Image.Image:
    """Decode the file: EXIF-upright, RGB, first frame, transparency on white.

    docs/images.md has what becomes of every kind of file.

    Raises:
        ImageError: the file is missing, no image, truncated, or too large.
    """
    with ignoring_oddities():
        return decode(path, read_bytes(path), pixels)


def decode(path: str | Path, content: bytes, pixels: PixelSpec = FULL) -> Image.Image:
    """`read_image` of a file's content, for threads, which are to be `ignoring_oddities` together.

    `path` is for the message.
    """
    image = _open(path, content, pixels.short_side if pixels.decoder == "draft" else None)
    size = pixels.reduced(*image.size)
    if size == image.size:
        return image
    # A gap of 2 averages whole blocks of pixels first: several times faster for large photographs.
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def size_of(path: str | Path) -> tuple[int, int]:
    """(width, height) as the file's header has them, before it is turned upright.

    Raises:
        ImageError: it has none.
    """
    return _header(path, read_bytes(path)).size


def mode_of(path: str | Path, content: bytes) -> str:
    """The colour mode of the file (RGB, L, CMYK, …), which is not that of its pixels when read.

    Raises:
        ImageError: it has none.
    """
    return _header(path, content).mode


def decoder_versions() -> tuple[str | None, ...]:
    """Of what turns bytes into pixels: another version may give other ones."""
    codecs = (features.version(name) for name in ("jpg", "webp", "avif", "libtiff", "zlib"))
    heic = version("pillow-heif") if opens_heic() else None
    return (version("pillow"), *codecs, heic)


@contextmanager
def ignoring_oddities() -> Iterator[None]:
    """No warnings of odd metadata, which harm nobody; what matters raises.

    Changes the process's filters, so threads share one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_problem(path: str | Path, content: bytes) -> str | None:
    """Why `content` cannot be decoded, or None.

    A JPEG is decoded at an eighth of its size: the whole stream is still parsed, so a truncated
    file is found, at a fraction of the cost. Many threads may call it, `ignoring_oddities`.
    """
    try:
        _open(path, content, draft=1)
    except ImageError as error:
        return error.reason
    return None


def opens(path: str | Path) -> bool:
    """Whether the content begins as an image does."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return False
        with Path(path).open("rb") as file, ignoring_oddities():
            if _HEIC.match(file.read(64)):
                return True
            file.seek(0)
            Image.open(file, formats=_FORMATS)
    except Exception:  # nearly anything, as in `_explained`
        return False
    return True


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; raises `ImageError` where there is none to read."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
            raise ImageError(path, "is not a regular file")
        if status.st_size > _MOST_BYTES:
            raise ImageError(path, f"has more than {_MOST_BYTES // 1024**3} GiB")
        return Path(path).read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and Path(path).is_symlink():
            raise ImageError(path, "cannot be read (a link to nothing)") from error
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a list of files may hold anything
        raise ImageError(path, "is not the name of a file") from error


def _open(path: str | Path, content: bytes, draft: int | None) -> Image.Image:
    """`draft`: a JPEG may be decoded smaller, with at least so many pixels on each side."""
    image = _header(path, content)
    with _explained(path):
        if draft is not None:
            image.draft("RGB", (draft, draft))
        image.load()
        return _to_rgb(path, image)


def _header(path: str | Path, content: bytes) -> Image.Image:
    """The image, of which no pixel is decoded yet."""
    if not content:
        raise ImageError(path, "is empty (0 bytes)")
    formats: tuple[str, ...] = _FORMATS
    if _HEIC.match(content):
        if not opens_heic():
            raise ImageError(
                path,
                "is a HEIC photo, which needs the package pillow-heif: pip install 'cnnft[heic]'",
            )
        formats = ("HEIF",)
    with _explained(path):
        return Image.open(io.BytesIO(content), formats=formats)


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """What Pillow raises within it becomes an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            path, "is not an image of a format that cnnft reads, or is badly damaged"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageError(path, f"has more than {limit} million pixels") from error
    except MemoryError as error:
        raise ImageError(path, "does not fit in memory") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(path, f"is damaged ({first_line(error)})") from error


@cache
def opens_heic() -> bool:
    """Whether the plugin is installed; it is loaded when the first such photo is met."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _to_rgb(path: str | Path, image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(path, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # nearly anything, of metadata that nobody can read; the pixels are good
        pass
    return image


def _eight_bits(path: str | Path, image: Image.Image) -> Image.Image:
    """Grey values to 0..255. White is 65535 for integers, and 1 for floats, or 255 beyond that.

    Pillow's own conversion clips 16 bits at 255 and turns such images white.
    """
    if image.mode != "F":
        image = image.convert("I")
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    white = 65535 if image.mode == "I" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= white:
        raise ImageError(
            path,
            f"has values from {low:g} to {high:g}, of which none is white: save it with 8 bits",
        )
    if image.mode == "I":
        return image.point(lambda value: value / 257).convert("L")
    return image.point(lambda value: value * (255 / white) + 0.5).convert("L")
