"""`InputSpec` -> the training, evaluation and test-time transforms: PIL image -> tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cnnft.config import LARGEST_IMAGE, Fit, TestTimeViews, are_statistics

_CROP_FRACTIONS = 0.1, 10.0


@dataclass(frozen=True)
class InputSpec:
    """How pixels become the tensor that the weights expect."""

    size: int
    """Height and width of the tensor in pixels."""
    crop_fraction: float
    """size / (shorter side after resizing): the share of the image that a centre crop keeps."""
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "crop"
    """What becomes of images that are not square: centre crop, resize to a square, or pad."""

    def __post_init__(self) -> None:
        """Raises `ValueError`: a description may hold anything."""
        for name, holds in {
            "size": _is_number(self.size, 1, LARGEST_IMAGE) and isinstance(self.size, int),
            "crop_fraction": _is_number(self.crop_fraction, *_CROP_FRACTIONS),
            "interpolation": self.interpolation in {mode.value for mode in InterpolationMode},
            "mean or std": are_statistics(self.mean, self.std),
            "fit": self.fit in get_args(Fit),
        }.items():
            if not holds:
                raise ValueError(f"{name} makes no sense")

    @property
    def resize(self) -> int:
        """Side in pixels before the centre crop."""
        # The epsilon undoes the rounding of size / (size / resize); no timm model is affected.
        return math.floor(self.size / self.crop_fraction + 1e-6)


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and least <= value <= most


def training_transform(spec: InputSpec) -> Callable[[Image.Image], Tensor]:
    """Random resized crop (area 8-100 %) and horizontal flip -> (3, size, size)."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(spec.size, interpolation=_mode(spec)),
            v2.RandomHorizontalFlip(),
            _Normalize(spec),
        ]
    )


_LONGEST = 50
"""Times as long as wide: of longer images the middle is seen. Enlarged until the shorter side fits,
one of 1 × 20,000 pixels would fill gigabytes."""


class EvaluationViews:
    """Test-time augmentation: an image -> its views (V, 3, size, size), evaluation's own included.

    none: the evaluation view (V = 1); hflip: that and its mirror image (2); five-crop: the centre
    and the four corners (5); ten-crop: those and their mirror images (10), as in Krizhevsky,
    Sutskever and Hinton, 2012.

    Without augmentation the tensor equals that of timm's and torchvision's own transforms.
    """

    def __init__(self, spec: InputSpec, tta: TestTimeViews = "none") -> None:
        self.spec = spec
        self.tta = tta
        self.normalize = _Normalize(spec)

    def __call__(self, image: Image.Image) -> Tensor:
        crops = self._crops(image)
        if self.tta in ("hflip", "ten-crop"):
            crops += [F.horizontal_flip(crop) for crop in crops]
        return torch.stack([self.normalize(crop) for crop in crops])

    def _crops(self, image: Image.Image) -> list[Image.Image]:
        size = self.spec.size
        if self.tta in ("none", "hflip"):
            return [F.center_crop(_resize(image, self.spec, self.spec.resize), [size, size])]
        # Corners need a margin; a spec that keeps the whole image has none, so 8/7 is the least
        # (256 for 224, the classic choice).
        resized = _resize(image, self.spec, max(self.spec.resize, round(size * 8 / 7)))
        *corners, _ = F.five_crop(resized, [size, size])
        return [F.center_crop(_resize(image, self.spec, self.spec.resize), [size, size]), *corners]


def _resize(image: Image.Image, spec: InputSpec, side: int) -> Image.Image:
    if spec.fit == "squash":
        return F.resize(image, [side, side], interpolation=_mode(spec))
    if spec.fit == "pad":
        scale = side / max(image.size)
        width, height = (max(round(extent * scale), 1) for extent in image.size)
        image = F.resize(image, [height, width], interpolation=_mode(spec))
        left, top = (side - width) // 2, (side - height) // 2
        fill = [round(255 * channel) for channel in spec.mean]
        return F.pad(image, [left, top, side - width - left, side - height - top], fill=fill)
    most = _LONGEST * min(image.size)
    if max(image.size) > most:
        image = F.center_crop(image, [min(extent, most) for extent in (image.height, image.width)])
    return F.resize(image, [side], interpolation=_mode(spec))


def _mode(spec: InputSpec) -> InterpolationMode:
    return InterpolationMode(spec.interpolation)


class _Normalize:
    """PIL image -> float tensor (3, H, W), scaled to [0, 1], minus mean, over std."""

    def __init__(self, spec: InputSpec) -> None:
        self.mean, self.std = list(spec.mean), list(spec.std)

    def __call__(self, image: Image.Image) -> Tensor:
        # timm and torchvision's presets divide by 255; v2.to_dtype multiplies by 1 / 255, which
        # differs in the last bit.
        return F.normalize(F.pil_to_tensor(image) / 255, self.mean, self.std)
