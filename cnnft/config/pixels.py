"""Settings of images: preprocessing, and augmentation in training."""

from dataclasses import dataclass
from typing import Literal

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
        "Side of the network's input in pixels.",
        bounds=Bounds(16, LARGEST_IMAGE),
        panel=INPUT,
        shown="as pretrained",
        metavar="N",
    )
    fit: Fit | None = option(
        None,
        "Images that are not square: center crop, squash, or pad.",
        panel=INPUT,
        shown="as pretrained",
    )
    normalize: str = option(
        "pretrained",
        "Mean and std: the pretraining's (pretrained), the training images' (dataset), or "
        "MEAN/STD per channel.",
        panel=INPUT,
        metavar="STATS",
    )
    # Evaluation always reads images in full.
    train_resolution: int | Literal["auto", "full"] = option(
        "auto",
        "Shorter side in pixels to which training images are reduced; auto: what the input size "
        "can use; full: not at all.",
        bounds=Bounds(16, LARGEST_IMAGE),
    )
    decoder: Decoder = option(
        "pillow",
        "JPEG decoding in training; draft: at a fraction of the size, faster, and other pixels.",
        panel=MACHINE,
    )


@dataclass(frozen=True)
class AugmentationConfig:
    """Random transforms of training images and batches; parts that are None are the preset's."""

    augment: Augment = option(
        "basic", "Augmentation preset (cnnft check --show-augment draws it).", panel=MAIN
    )
    hflip: bool | None = option(
        None,
        "Random horizontal flips; not where b and d differ.",
        panel=AUGMENTATION,
        shown="by --augment",
    )
    vflip: bool | None = option(None, "Random vertical flips.")
    rotation: float | None = option(
        None, "Random rotation, degrees at most.", bounds=Bounds(0, 180)
    )
    translation: float | None = option(
        None, "Random translation, share of the side at most.", bounds=Bounds(0, 1)
    )
    shear: float | None = option(None, "Random shear, degrees at most.", bounds=Bounds(0, 89))
    perspective: float | None = option(
        None, "Random perspective in half of the images: distortion scale.", bounds=Bounds(0, 1)
    )
    crop_and_pad: float | None = option(
        None, "Reflect-pad by this share of the side, then crop back.", bounds=Bounds(0, 0.9)
    )
    brightness: float | None = option(
        None, "Color jitter: brightness times 1 ± this.", bounds=Bounds(0, 1)
    )
    contrast: float | None = option(
        None, "Color jitter: contrast times 1 ± this.", bounds=Bounds(0, 1)
    )
    saturation: float | None = option(
        None, "Color jitter: saturation times 1 ± this.", bounds=Bounds(0, 1)
    )
    hue: float | None = option(
        None, "Color jitter: hue shift, share of the color circle at most.", bounds=Bounds(0, 0.5)
    )
    sharpness: float | None = option(
        None, "Sharpness times 1 + this in half of the images.", bounds=Bounds(0, 100)
    )
    blur: float | None = option(
        None, "Gaussian blur, sigma in pixels at most.", bounds=Bounds(0, 5)
    )
    noise: float | None = option(
        None, "Gaussian noise: sigma, where 255 is 1.", bounds=Bounds(0, 1)
    )
    pca: float | None = option(
        None, "PCA color noise (AlexNet's lighting): sigma.", bounds=Bounds(0, 10)
    )
    erase: float | None = option(
        None,
        "Random erasing: probability that a rectangle is erased.",
        bounds=Bounds(0, 1),
        panel=AUGMENTATION,
        shown="by --augment",
        metavar="P",
    )
    mixup: float = option(
        0.0,
        "Mixup: alpha of its Beta distribution; 0.2 is usual.",
        bounds=Bounds(0, 100),
        panel=AUGMENTATION,
        shown="off",
        metavar="ALPHA",
    )
    cutmix: float = option(
        0.0,
        "CutMix: alpha of its Beta distribution; 1 is usual.",
        bounds=Bounds(0, 100),
        panel=AUGMENTATION,
        shown="off",
        metavar="ALPHA",
    )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, so that no view comes again."""
        return bool(self.mixup or self.cutmix)
