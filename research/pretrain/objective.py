"""What the network is asked about each image, and how wrong its answers are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bank import DESCRIPTORS
from .world import ABSENT, Batch

WEIGHTS = {
    "shape": 0.5, "kind": 0.5, "lobes": 0.3, "hollow": 0.2, "elongation": 0.2, "instances": 0.2,
    "fore_style": 0.2, "back_style": 0.2, "fore_texture": 0.5, "back_texture": 0.6,
    "fore_family": 0.5, "back_family": 0.7,
    "fore_palette": 0.3, "part_palette": 0.2, "back_palette": 0.3,
    "descriptor": 2.0, "colours": 0.5, "dense": 6.0, "mask": 1.0,
}  # fmt: skip
ORIENTATIONS = 8
DENSE = 2 + 3 + ORIENTATIONS + 1
LEVELS = 4
"""Grey levels per channel of the colour histogram."""
DETAIL = 8
"""The foreground mask is asked for on a grid this much finer than the last feature map."""


class Objective(nn.Module):
    """Linear heads on the pooled features and on the cells of the last feature map."""

    def __init__(self, classes: dict[str, int], features: int) -> None:
        super().__init__()
        self.labels = nn.ModuleDict({name: nn.Linear(features, n) for name, n in classes.items()})
        self.descriptor = nn.Linear(features, DESCRIPTORS)
        self.colours = nn.Linear(features, LEVELS**3)
        self.dense = nn.Conv2d(features, DENSE, 1)
        self.mask = nn.Conv2d(features, DETAIL**2, 1)

    def forward(self, cells: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all losses, and each loss and accuracy by name, detached.

        `cells` is the last feature map (n, features, grid, grid).
        """
        pooled = cells.mean((2, 3))
        losses, seen = {}, {}
        for name, head in self.labels.items():
            losses[name], seen[f"{name}_acc"] = _classify(head(pooled), batch.labels[name])
        present = (batch.labels["shape"] != ABSENT).float()[:, None]
        losses["descriptor"] = (
            F.smooth_l1_loss(self.descriptor(pooled), batch.descriptor, reduction="none") * present
        ).mean()
        histogram = colour_histogram(batch.clean)
        losses["colours"] = -(histogram * self.colours(pooled).log_softmax(1)).sum(1).mean()
        target = dense_targets(batch, cells.shape[-1])
        losses["dense"] = F.smooth_l1_loss(self.dense(cells), target, beta=0.2)
        mask = F.pixel_shuffle(self.mask(cells), DETAIL)
        coverage = F.adaptive_avg_pool2d(batch.coverage[:, :1], mask.shape[-1])
        losses["mask"] = F.binary_cross_entropy_with_logits(mask, coverage.clamp(0, 1))
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
        return total, {"loss": total.detach(), **{k: v.detach() for k, v in losses.items()}, **seen}


def _classify(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the labelled images, and accuracy; 0 where none is labelled."""
    known = (labels != ABSENT).sum().clamp(min=1)
    loss = F.cross_entropy(logits, labels, ignore_index=ABSENT, reduction="sum") / known
    return loss, (logits.argmax(1) == labels).sum() / known


def colour_histogram(images: Tensor) -> Tensor:
    """(n, LEVELS^3) shares of RGB colours, each channel cut into LEVELS."""
    levels = (images * (LEVELS - 1e-3)).long().flatten(2)
    index = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    counts = images.new_zeros(len(images), LEVELS**3)
    share = torch.full_like(index, 1 / index.shape[1], dtype=images.dtype)
    return counts.scatter_add_(1, index, share)


def dense_targets(batch: Batch, grid: int) -> Tensor:
    """What each cell shows: (n, DENSE, grid, grid).

    Coverage of foreground and part, mean colour, a histogram of edge orientations (Dalal & Triggs
    2005) and log contrast.
    """
    grey = batch.clean.mean(1, keepdim=True)
    right = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1))
    down = F.pad(grey[:, :, 2:] - grey[:, :, :-2], (0, 0, 1, 1))
    strength = torch.hypot(right, down)
    turn = torch.atan2(down, right) % math.pi / math.pi
    index = (turn * ORIENTATIONS).long().clamp(max=ORIENTATIONS - 1)
    edges = grey.new_zeros(len(grey), ORIENTATIONS, *grey.shape[2:]).scatter_(1, index, strength)
    edges = F.adaptive_avg_pool2d(edges, grid)
    contrast = edges.sum(1, keepdim=True)
    plain = F.adaptive_avg_pool2d(torch.cat([batch.coverage, batch.clean], 1), grid)
    shares = 2 * edges / (contrast + 0.02)
    return torch.cat([plain, shares, 0.5 * torch.log(contrast + 0.01)], 1)
