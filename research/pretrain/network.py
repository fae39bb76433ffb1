"""The backbone's architecture and how pixels enter it."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .world import World

ARCHITECTURE = "resnet10t"
MODEL_ARGS = {"channels": [32, 64, 128, 256], "stem_width": 24}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FINAL_SIZE = 128


def build(device: torch.device) -> nn.Module:
    """The backbone without a classifier, in the memory format that convolves fastest."""
    model = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
    return model.to(device, memory_format=torch.channels_last)


def normalise(images: Tensor) -> Tensor:
    """RGB in [0, 1] to the network's input."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def recalibrate(model: nn.Module, world: World, batches: int = 40, count: int = 64) -> None:
    """Sets BatchNorm's running statistics to the plain average over fresh images at FINAL_SIZE."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    for step in range(batches):
        batch = world.batch(-1 - step, 0, count, FINAL_SIZE)  # training never uses negative steps
        model(normalise(batch.images))
    for layer in layers:
        layer.momentum = 0.1
    model.eval()
