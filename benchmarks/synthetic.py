"""Generated JPEGs in class folders, as many as wanted, and a network with random weights."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

PICTURES = 20  # different ones in each class; files beyond differ in a comment alone
COARSE = 16  # pixels between the points from which a picture is interpolated


def draw_images(
    folder: Path, images: int, classes: int = 2, size: tuple[int, int] = (500, 375), seed: int = 0
) -> Path:
    """folder/<class>/<n>.jpg; no two files are equal, and the tint tells the class."""
    for label in range(classes):
        place = folder / f"class-{label:04d}"
        place.mkdir(parents=True)
        count = images // classes + (label < images % classes)
        pictures = list(_pictures(min(count, PICTURES), label, size, seed))
        for n in range(count):
            content = _with_comment(pictures[n % PICTURES], f"{seed} {label} {n}")
            (place / f"{n:06d}.jpg").write_bytes(content)
    return folder


def _pictures(count: int, label: int, size: tuple[int, int], seed: int) -> Iterator[bytes]:
    random = np.random.default_rng([seed, label])
    tint = np.random.default_rng(label).uniform(-60, 60, 3)
    for _ in range(count):
        shape = size[1] // COARSE + 1, size[0] // COARSE + 1, 3
        coarse = random.normal(128 + tint, 50, shape).clip(0, 255).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noisy = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=90)
        yield content.getvalue()


def _with_comment(jpeg: bytes, comment: str) -> bytes:
    """`jpeg` with a COM segment after its first marker."""
    text = comment.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def random_weights(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A timm folder of `architecture` with random weights."""
    torch.manual_seed(seed)
    network = timm.create_model(architecture)
    description = {
        "architecture": architecture,
        "num_classes": network.num_classes,
        "pretrained_cfg": network.pretrained_cfg,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(description))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder
