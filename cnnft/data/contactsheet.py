"""The contact sheet: augmented training images, to look at."""

import io

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cnnft.data.augmentation import PRESETS, Augmentation, training_transform
from cnnft.data.dataset import Samples
from cnnft.data.loading import TrainingImages
from cnnft.data.transforms import InputSpec, denormalize
from cnnft.errors import CnnftError

_CLASSES, _IMAGES, _DRAWS = 8, 3, 7
_TILE, _GAP, _LINE = 160, 4, 22  # pixels; of a line of text


def contact_sheet(samples: Samples, spec: InputSpec, parts: Augmentation) -> bytes:
    """A PNG: by class, images as evaluation sees them, and beside each some draws of training.

    Raises:
        CnnftError: none of the images can be read.
    """
    plain = TrainingImages(samples, training_transform(spec, PRESETS["none"]), seed=0)
    drawn = TrainingImages(samples, training_transform(spec, parts), seed=0)
    strips: list[Image.Image] = []
    for label, name in enumerate(samples.classes[:_CLASSES]):
        members = [i for i, of in enumerate(samples.labels) if of == label]
        rows = []
        for index in members[:: -(-len(members) // _IMAGES)]:  # neighbours are often alike
            keys = [(draw, index) for draw in range(_DRAWS)]
            items = [plain[0, index], *(drawn[key] for key in keys)]
            if not any(isinstance(item, str) for item in items):
                rows.append(_row([item[0] for item in items if not isinstance(item, str)], spec))
        if rows:
            strips += [_text(f"{name}: as evaluated, and {_DRAWS} draws", rows[0].width), *rows]
    if not strips:
        raise CnnftError("none of the images for the contact sheet can be read")
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _row(images: list[Tensor], spec: InputSpec) -> Image.Image:
    row = Image.new("RGB", (len(images) * (_TILE + _GAP), _TILE + _GAP), "white")
    for place, pixels in enumerate(images):
        row.paste(_tile(pixels, spec), (place * (_TILE + _GAP), 0))
    return row


def _tile(pixels: Tensor, spec: InputSpec) -> Image.Image:
    values = (denormalize(pixels, spec) * 255).round().clamp(0, 255).byte()
    image = Image.fromarray(values.permute(1, 2, 0).numpy())
    return image.resize((_TILE, _TILE), Image.Resampling.BICUBIC)


def _text(words: str, width: int) -> Image.Image:
    line = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(line).text((2, 3), words, "black", ImageFont.load_default(14))
    return line
