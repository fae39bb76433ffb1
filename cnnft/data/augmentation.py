"""Data augmentation of training images, and of batches (mixup, CutMix); see docs/augmentation.md.

All of it draws from torch's CPU generator, which is seeded for one sample
(`loading.TrainingImages`) or one step (`training.step`), so it depends on nothing that came before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from cnnft.config.choices import Augment
from cnnft.config.pixels import AugmentationConfig
from cnnft.data.transforms import InputSpec, evaluation_crop, to_tensor

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pixels (B, 3, H, W), labels (B,)) -> pixels of the same shape, labels or soft targets (B, C)."""


@dataclass(frozen=True)
class Augmentation:
    """What augments a training image; a part that is 0 is left out. `Config` has the units."""

    crop: bool = False
    """RandomResizedCrop, of 8-100 % of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al.,
    2015), instead of the centre crop of evaluation."""
    hflip: bool = False
    vflip: bool = False
    crop_and_pad: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    policy: Literal["trivial", "randaugment"] | None = None
    """TrivialAugment (Müller and Hutter, 2021), or RandAugment (Cubuk et al., 2020) with two
    operations of magnitude 9."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    sharpness: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    pca: float = 0.0
    erase: float = 0.0

    @property
    def random(self) -> bool:
        return self != Augmentation()


_BASIC = Augmentation(crop=True, hflip=True)
_STANDARD = replace(_BASIC, brightness=0.4, contrast=0.4, saturation=0.4)

PRESETS: dict[Augment, Augmentation] = {
    "none": Augmentation(),
    "basic": _BASIC,
    "standard": _STANDARD,
    "strong": replace(_STANDARD, hue=0.05, rotation=15, erase=0.25),
    "trivial": replace(_BASIC, policy="trivial"),
    "randaugment": replace(_BASIC, policy="randaugment"),
    "lecture": replace(_BASIC, brightness=0.4, saturation=0.4, hue=0.1, pca=0.1),
}


def augmentation(config: AugmentationConfig) -> Augmentation:
    """The preset, with the parts that the user overrides."""
    return replace(PRESETS[config.augment], **changes(config))


def changes(config: AugmentationConfig) -> dict[str, Any]:
    """The parts that the user overrides."""
    given = {part.name: getattr(config, part.name, None) for part in fields(Augmentation)}
    return {name: value for name, value in given.items() if value is not None}


def training_transform(
    spec: InputSpec, parts: Augmentation = _BASIC
) -> Callable[[Image.Image], Tensor]:
    """PIL image -> (3, size, size), normalised."""
    size, fill = spec.size, spec.mean_colour
    smooth = InterpolationMode.BILINEAR  # images are turned with two or three modes only
    steps: list[Callable[..., object]] = [
        _resized_crop(spec) if parts.crop else partial(evaluation_crop, spec=spec)
    ]
    if parts.hflip:
        steps.append(v2.RandomHorizontalFlip())
    if parts.vflip:
        steps.append(v2.RandomVerticalFlip())
    if parts.crop_and_pad:
        margin = round(parts.crop_and_pad * size)
        steps.append(v2.RandomCrop(size, padding=margin, padding_mode="reflect"))
    if parts.rotation or parts.translation or parts.shear:
        shift, shear = (parts.translation,) * 2, parts.shear or None
        steps.append(v2.RandomAffine(parts.rotation, shift, None, shear, smooth, fill))
    if parts.perspective:
        steps.append(v2.RandomPerspective(parts.perspective, interpolation=smooth, fill=fill))
    if parts.policy == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=smooth, fill=fill))
    if parts.policy == "randaugment":
        steps.append(v2.RandAugment(interpolation=smooth, fill=fill))
    if parts.brightness or parts.contrast or parts.saturation or parts.hue:
        jitter = v2.ColorJitter(parts.brightness, parts.contrast, parts.saturation, parts.hue)
        steps.append(jitter)
    if parts.sharpness:
        steps.append(v2.RandomAdjustSharpness(1 + parts.sharpness))
    steps.append(to_tensor)
    if parts.blur:
        width = 2 * math.ceil(3 * parts.blur) + 1
        steps.append(v2.GaussianBlur(width, sigma=(min(0.1, parts.blur), parts.blur)))
    if parts.noise:
        steps.append(v2.GaussianNoise(sigma=parts.noise))
    if parts.pca:
        steps.append(Lighting(parts.pca))
    steps.append(v2.Normalize(spec.mean, spec.std))
    if parts.erase:
        steps.append(v2.RandomErasing(parts.erase))  # 0 is the mean colour here
    return v2.Compose(steps)


def _resized_crop(spec: InputSpec) -> v2.Transform:
    return v2.RandomResizedCrop(
        spec.size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), interpolation=spec.mode
    )


def random_crop(spec: InputSpec) -> Callable[[Image.Image], Image.Image]:
    """The preset "basic" before normalisation: size × size."""
    return v2.Compose([_resized_crop(spec), v2.RandomHorizontalFlip()])


class Lighting:
    """Shift the colour of an image (3, H, W), 255 being 1, along ImageNet's principal axes.

    Adds Σₖ αₖ λₖ pₖ to every pixel, with αₖ ~ N(0, sigma²) drawn once per image (Krizhevsky,
    Sutskever and Hinton, 2012, section 4.1). pₖ and λₖ are those of fb.resnet.torch.
    """

    VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
    AXES = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    """(3 colours, 3 components)."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, pixels: Tensor) -> Tensor:
        shift = self.AXES @ (self.sigma * torch.randn(3) * self.VALUES)
        return pixels + shift[:, None, None]


def mixing(config: AugmentationConfig, classes: int) -> Mix:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), of each image with its neighbour.

    The labels (B,) become soft targets (B, C). With both, one is drawn for each batch.
    """
    mixes = [
        mix(alpha=float(alpha), num_classes=classes)  # Beta takes no integers
        for mix, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        if alpha
    ]

    def mix(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # A single image has no neighbour, and one that does not count is always a single one.
        if not mixes or len(labels) == 1:
            return pixels, labels
        return v2.RandomChoice(mixes)(pixels, labels)

    return mix
