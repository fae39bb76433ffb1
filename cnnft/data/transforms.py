"""`InputSpec` -> the evaluation transform: PIL image -> tensor."""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cnnft.config.choices import Fit
from cnnft.config.pixels import LARGEST_IMAGE
from cnnft.config.texts import Channels, are_statistics

_CROP_FRACTIONS = 0.1, 10.0


@dataclass(frozen=True)
class InputSpec:
    """How pixels become the tensor that the weights expect."""

    size: int
    """Height and width of the tensor in pixels."""
    crop_fraction: float
    """size / (shorter side after resizing): the share of the image that a centre crop keeps."""
    interpolation: str
    mean: Channels
    std: Channels
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

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)

    @property
    def mean_colour(self) -> list[int]:
        """What fills the places where an image has no pixels: 0 to the network."""
        return [round(255 * channel) for channel in self.mean]


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and least <= value <= most


_LONGEST = 50
"""Times as long as wide: of longer images the middle is seen. Enlarged until the shorter side fits,
one of 1 × 20,000 pixels would fill gigabytes."""


class EvaluationViews:
    """An image -> its evaluation view (1, 3, size, size).

    The tensor equals that of timm's and torchvision's own transforms.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.normalize = v2.Compose([to_tensor, v2.Normalize(spec.mean, spec.std)])

    def __call__(self, image: Image.Image) -> Tensor:
        return self.of_crop(evaluation_crop(image, self.spec))

    def of_crop(self, crop: Image.Image) -> Tensor:
        """The same where `evaluation_crop` was done before."""
        return self.normalize(crop)[None]


class Normalizing(nn.Module):
    """A network of images as bytes, uint8 (B, 3, H, W), which it normalises as `EvaluationViews`.

    So data-loader workers hand over a quarter of the memory.
    """

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.white: Tensor
        self.mean: Tensor
        self.std: Tensor
        # Tensors, because a GPU multiplies by the reciprocal where it is to divide by a number.
        self.register_buffer("white", torch.tensor(255.0))
        for name, values in (("mean", spec.mean), ("std", spec.std)):  # in JSON 0 is a whole number
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])
        self.to(next(network.parameters()).device)

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.to(self.mean.dtype).div_(self.white).sub_(self.mean).div_(self.std)
        outputs: Tensor = self.network(values)
        return outputs


def evaluation_crop(image: Image.Image, spec: InputSpec) -> Image.Image:
    """What evaluation sees of an image, size × size, before normalisation."""
    return F.center_crop(resize(image, spec, spec.resize), [spec.size, spec.size])


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), float, 255 being 1."""
    # timm and torchvision's presets divide by 255; v2.to_dtype multiplies by 1 / 255, which
    # differs in the last bit.
    return F.pil_to_tensor(image) / 255


def denormalize(pixels: Tensor, spec: InputSpec) -> Tensor:
    """The inverse of normalisation: (..., 3, H, W), 255 being 1."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return pixels * std + mean


def resize(image: Image.Image, spec: InputSpec, side: int) -> Image.Image:
    """Its shorter side is `side` pixels, both where the whole image is to be seen."""
    if spec.fit == "squash":
        return F.resize(image, [side, side], interpolation=spec.mode)
    if spec.fit == "pad":
        scale = side / max(image.size)
        width, height = (max(round(extent * scale), 1) for extent in image.size)
        image = F.resize(image, [height, width], interpolation=spec.mode)
        left, top = (side - width) // 2, (side - height) // 2
        return F.pad(
            image, [left, top, side - width - left, side - height - top], fill=spec.mean_colour
        )
    most = _LONGEST * min(image.size)
    if max(image.size) > most:
        image = F.center_crop(image, [min(extent, most) for extent in (image.height, image.width)])
    return F.resize(image, [side], interpolation=spec.mode)
