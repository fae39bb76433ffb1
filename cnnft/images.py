"""From the bytes of a file to upright RGB pixels, or one sentence about why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from cnnft.errors import CnnftError, first_line

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

_RUNS_A_PROGRAM = "EPS"
"""The format for which Pillow starts Ghostscript, which runs what is in the file."""

_BACKGROUND = (255, 255, 255)
"""Transparent pixels show white, as on a page."""


class ImageError(CnnftError):
    """A file that cannot be read as an image; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def read_image(path: str | Path) -> Image.Image:
    """Decode the file in full: EXIF-upright, RGB, first frame, transparency on white.

    Raises:
        ImageError: the file is missing, no image, truncated, or too large.
    """
    with ignoring_oddities():
        return decode(path)


def decode(path: str | Path) -> Image.Image:
    """`read_image` for threads, which are to be `ignoring_oddities` together."""
    return _open(path, read_bytes(path), draft=False)


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
        _open(path, content, draft=True)
    except ImageError as error:
        return error.reason
    return None


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; raises `ImageError` where there is none to read."""
    try:
        # A pipe would be waited for without end.
        if Path(path).exists() and not Path(path).is_file():
            raise ImageError(path, "is not a regular file")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a list of files may hold anything
        raise ImageError(path, "is not the name of a file") from error


def _open(path: str | Path, content: bytes, *, draft: bool) -> Image.Image:
    if not content:
        raise ImageError(path, "is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(content))
        if image.format == _RUNS_A_PROGRAM:
            raise ImageError(path, "is a PostScript program, not an image")
        if draft:
            image.draft("RGB", (1, 1))
        image.load()
        return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, "is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageError(path, f"has more than {limit} million pixels") from error
    except MemoryError as error:
        raise ImageError(path, "does not fit in memory") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ImageError(path, f"is damaged ({first_line(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16 bits at 255 and turns such images white.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
