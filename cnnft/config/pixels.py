"""Settings of images: preprocessing, and augmentation in training."""

from dataclasses import dataclass
from typing import Any, Literal

from cnnft.config.choices import Augment, Decoder, Fit
from cnnft.config.options import Bounds, option
from cnnft.config.panels import AUGMENTATION, INPUT, MACHINE, MAIN

LARGEST_IMAGE = 8192
"""Pixels of a side that a network is given; a description that says more is damaged."""


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes the tensor that the network sees."""

    image_size: int | None = option(
        None,
        "Input resolution: side of the network's input in pixels.",
        bounds=Bounds(16, LARGEST_IMAGE),
        panel=INPUT,
        shown="as pretrained",
        metavar="N",
    )
    fit: Fit | None = option(
        None,
        "How images become square: center crop, squash (ignore the aspect ratio), or pad.",
        panel=INPUT,
        shown="as pretrained",
    )
    normalize: str = option(
        "pretrained",
        "Normalisation by mean and std of each channel: those of the pretraining (pretrained), of "
        "the training images (dataset), or R,G,B/R,G,B.",
        panel=INPUT,
        metavar="STATS",
    )
    # Evaluation always reads images in full.
    train_resolution: int | Literal["auto", "full"] = option(
        "auto",
        "Shorter side in pixels to which training images are downscaled when decoded; auto: what "
        "the input resolution can use; full: not at all.",
        bounds=Bounds(16, LARGEST_IMAGE),
    )
    decoder: Decoder = option(
        "pillow",
        "JPEG decoding in training; draft: DCT scaling, faster, with slightly other pixels.",
        panel=MACHINE,
    )


def _part(help: str, **declared: Any) -> Any:
    """Of the preset, unless it is given."""
    return option(None, help, shown="by --augment", **declared)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random transforms of training images and batches; parts that are None are the preset's."""

    augment: Augment = option(
        "basic",
        "Augmentation preset: none, basic, standard, strong, trivial, randaugment or lecture "
        "(cnnft check --show-augment draws them).",
        panel=MAIN,
        metavar="PRESET",
    )
    hflip: bool | None = _part(
        "Random horizontal flips; switch them off where left and right matter.",
        panel=AUGMENTATION,
    )
    vflip: bool | None = _part("Random vertical flips.")
    rotation: float | None = _part(
        "Random rotation: largest angle in degrees.", bounds=Bounds(0, 180)
    )
    translation: float | None = _part(
        "Random translation: largest shift as a fraction of the side.", bounds=Bounds(0, 1)
    )
    shear: float | None = _part("Random shear: largest angle in degrees.", bounds=Bounds(0, 89))
    perspective: float | None = _part(
        "Random perspective with probability 1/2: distortion scale.", bounds=Bounds(0, 1)
    )
    crop_and_pad: float | None = _part(
        "Reflection padding by this fraction of the side, then a random crop.",
        bounds=Bounds(0, 0.9),
    )
    brightness: float | None = _part(
        "Color jitter: brightness times 1 ± this.", bounds=Bounds(0, 1)
    )
    contrast: float | None = _part("Color jitter: contrast times 1 ± this.", bounds=Bounds(0, 1))
    saturation: float | None = _part(
        "Color jitter: saturation times 1 ± this.", bounds=Bounds(0, 1)
    )
    hue: float | None = _part(
        "Color jitter: largest hue shift as a fraction of the color circle.",
        bounds=Bounds(0, 0.5),
    )
    sharpness: float | None = _part(
        "Random sharpness with probability 1/2: times 1 + this.", bounds=Bounds(0, 100)
    )
    blur: float | None = _part("Gaussian blur: largest sigma in pixels.", bounds=Bounds(0, 5))
    noise: float | None = _part(
        "Gaussian noise: sigma, of pixels from 0 to 1.", bounds=Bounds(0, 1)
    )
    pca: float | None = _part(
        "PCA color noise (AlexNet's lighting augmentation): sigma.", bounds=Bounds(0, 10)
    )
    erase: float | None = _part(
        "Random erasing: probability that a rectangle is erased.",
        bounds=Bounds(0, 1),
        panel=AUGMENTATION,
        metavar="P",
    )
    mixup: float = option(
        0.0,
        "Mixup: alpha of the Beta distribution; 0.2 is usual.",
        bounds=Bounds(0, 100),
        panel=AUGMENTATION,
        shown="off",
        metavar="ALPHA",
    )
    cutmix: float = option(
        0.0,
        "CutMix: alpha of the Beta distribution; 1 is usual.",
        bounds=Bounds(0, 100),
        panel=AUGMENTATION,
        shown="off",
        metavar="ALPHA",
    )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, so that no view comes again."""
        return bool(self.mixup or self.cutmix)
