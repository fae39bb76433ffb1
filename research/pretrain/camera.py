"""Light and camera: what happens to a composed picture before the network sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from .draw import Draw, blur


def shifted(fields: Tensor, draw: Draw) -> Tensor:
    """All fields moved by one common small random offset: where a shadow falls."""
    size = fields.shape[-1]
    offset = draw.integers(size // 8 + 1, 2) - size // 16
    return fields.roll(offset.tolist(), (2, 3))


def emboss(height: Tensor, draw: Draw) -> Tensor:
    """Shading in [-0.5, 0.5] of a height field by one distant light per image."""
    width = height.shape[-1] // 32 * 2 + 1
    soft = blur(height, width)
    light = draw.normal(len(height), 2, 1, 1)
    down, right = soft - soft.roll(width // 2, 2), soft - soft.roll(width // 2, 3)
    return (1.2 * (light[:, :1] * down + light[:, 1:] * right)).clamp(-0.5, 0.5)


def illuminate(images: Tensor, draw: Draw) -> Tensor:
    """A linear change of brightness across the frame."""
    ramp = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    slope = 0.12 * draw.normal(len(images), 2, 1, 1)
    return images * (1 + slope[:, :1] * ramp + slope[:, 1:] * ramp[:, None])


def develop(images: Tensor, draw: Draw) -> Tensor:
    """Exposure, contrast, saturation and white balance of each image, by up to a fifth or so."""
    n = len(images)
    balance = 1 + 0.18 * draw.normal(n, 1, 1, 1) + 0.05 * draw.normal(n, 3, 1, 1)
    images = images * balance
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (0.18 * draw.normal(n, 1, 1, 1)).exp()
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * (0.2 * draw.normal(n, 1, 1, 1)).exp()).clamp(0, 1)


def photograph(images: Tensor, draw: Draw) -> Tensor:
    """Slight defocus in a third of the images, sensor noise in all."""
    soft = draw.chance(0.35, len(images), 1, 1, 1)
    images = torch.where(soft, blur(images, 3), images)
    return images + draw.normal(*images.shape) * draw.uniform(0, 0.04, len(images), 1, 1, 1)
