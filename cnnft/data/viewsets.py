"""Test-time augmentation: an image -> the views whose probabilities are averaged."""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cnnft.config.texts import view_count
from cnnft.data.augmentation import random_crop
from cnnft.data.sampler import keyed_seed
from cnnft.data.transforms import EvaluationViews, InputSpec, evaluation_crop, resize

SCALES = (224, 256, 384, 480, 640)
"""Shorter sides of the resized image, in pixels, for a network of 224; for others in proportion."""


class ViewSet:
    """An image -> its views (V, 3, size, size), cut from one decoded image.

    - none: the evaluation view (V = 1); equals that of timm's and torchvision's own transforms.
    - hflip: that and its mirror image (2).
    - five-crop: that and the four corners (5).
    - ten-crop: those and their mirror images (10; Krizhevsky, Sutskever and Hinton, 2012).
    - multiscale: centre, corners and mirror images at five scales (50; He et al., 2016). Small
      images are enlarged.
    - random:K: K random crops, mirrored or not, as the default augmentation of training draws them.
      The pixels seed them, so an image has the same views wherever it lies.
    """

    def __init__(self, spec: InputSpec, name: str = "none") -> None:
        """Raises `UsageError`: there is no such set."""
        self.spec, self.name, self.count = spec, name, view_count(name)
        self._normalize = EvaluationViews(spec).normalize

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self._normalize(crop) for crop in self._views(image)])

    def as_bytes(self, image: Image.Image) -> Tensor:
        """The same before normalisation, for a `Normalizing` network: uint8, in memory
        channels last.
        """
        crops = [torch.from_numpy(np.array(crop)) for crop in self._views(image)]
        return torch.stack(crops).permute(0, 3, 1, 2)

    def _views(self, image: Image.Image) -> list[Image.Image]:
        match self.name:
            case "none":
                return [evaluation_crop(image, self.spec)]
            case "hflip":
                return _mirrored([evaluation_crop(image, self.spec)])
            case "five-crop":
                return self._crops(image)
            case "ten-crop":
                return _mirrored(self._crops(image))
            case "multiscale":
                sides = [round(self.spec.size * scale / SCALES[0]) for scale in SCALES]
                return _mirrored([crop for side in sides for crop in self._five(image, side)])
        return self._random(image)

    def _crops(self, image: Image.Image) -> list[Image.Image]:
        # Corners need a margin; a spec that keeps the whole image has none, so 8/7 is the least
        # (256 for 224, the classic choice).
        side = max(self.spec.resize, round(self.spec.size * 8 / 7))
        return [evaluation_crop(image, self.spec), *self._five(image, side)[:4]]

    def _five(self, image: Image.Image, side: int) -> list[Image.Image]:
        """The corners and the centre of the image, resized to `side`."""
        return list(F.five_crop(resize(image, self.spec, side), [self.spec.size] * 2))

    def _random(self, image: Image.Image) -> list[Image.Image]:
        draw = random_crop(self.spec)
        with torch.random.fork_rng(devices=[]):
            seed = keyed_seed("views", hashlib.sha256(image.tobytes()).hexdigest())
            torch.default_generator.manual_seed(seed)
            return [draw(image) for _ in range(self.count)]


def _mirrored(crops: list[Image.Image]) -> list[Image.Image]:
    """These, then their mirror images."""
    return crops + [F.horizontal_flip(crop) for crop in crops]
