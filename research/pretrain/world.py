"""The generated world: batches of images and of what there is to know about them.

An image is a textured or plain ground, sometimes other things in the distance, and mostly one large
foreground shape, sometimes repeated, lit from one side and casting a shadow. The batch at (seed,
step, rank) is a pure function of those three numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import KINDS, Bank
from .camera import develop, emboss, illuminate, photograph, shifted
from .draw import Draw, blur, hsv_to_rgb, sample
from .textures import FAMILIES

PALETTES = 64
MAX_LOBES = 21
FORE_STYLES = (0.3, 0.2, 0.5)
"""How often a foreground is plain, shaded along its relief, textured."""
BACK_STYLES = (0.25, 0.12, 0.63)
"""How often a background is smooth, textured but out of focus, textured."""
STYLES = 3
ELONGATIONS = 4
INSTANCES = 3
ABSENT = -1
"""A label that no loss looks at."""


@dataclass(frozen=True)
class Batch:
    images: Tensor
    """(n, 3, size, size) RGB, nominally in [0, 1], with camera noise."""
    clean: Tensor
    """The same before blur and noise: what dense targets are computed from."""
    coverage: Tensor
    """(n, 2, size, size): foreground, and its second material."""
    labels: dict[str, Tensor]
    """name -> (n,) class index or ABSENT; see World.classes."""
    descriptor: Tensor
    """(n, DESCRIPTORS) pose-free shape descriptor, zero where there is no foreground."""


class Plan(NamedTuple):
    """What each of n images is to show, drawn before anything is painted."""

    shape: Tensor
    variant: Tensor
    present: Tensor
    """False: the background alone."""
    instances: Tensor
    tiles: Tensor
    """(2, n) textures of foreground and background."""
    palettes: Tensor
    """(3, n) palettes of foreground, its second material, background."""
    fore_style: Tensor
    back_style: Tensor


class World:
    """Composes batches from a bank, on `device`, reproducibly from `seed`."""

    def __init__(self, bank: Bank, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        masks = torch.from_numpy(bank.masks).to(device)
        shapes, variants, _, size, _ = masks.shape
        # A half-size copy: at 64 px the full one would alias.
        half = F.avg_pool2d(masks.flatten(0, 1).float(), 2).round().byte()
        self.masks = {1: masks, 2: half.view(shapes, variants, 3, size // 2, size // 2)}
        self.textures = torch.from_numpy(bank.textures).to(device)
        self.kind = torch.from_numpy(bank.kind).to(device).long()
        self.lobes = torch.from_numpy(bank.lobes).to(device).long()
        self.hollow = torch.from_numpy(bank.hollow).to(device).long()
        self.family = torch.from_numpy(bank.family).to(device).long()
        self.descriptors = torch.from_numpy(bank.descriptors).to(device)
        elongation = self.descriptors[..., -2].flatten()
        self.bins = torch.quantile(elongation, torch.tensor([0.25, 0.5, 0.75], device=device))
        self.palettes = _palettes(Draw(seed, 7, device=device))

    @property
    def classes(self) -> dict[str, int]:
        """Name of each label -> number of classes."""
        shapes, textures = len(self.kind), len(self.textures)
        palettes = {f"{layer}_palette": PALETTES for layer in ("fore", "part", "back")}
        return {
            "shape": shapes,
            "kind": len(KINDS) + 1,
            "lobes": MAX_LOBES,
            "hollow": 2,
            "elongation": ELONGATIONS,
            "instances": INSTANCES + 1,
            "fore_style": STYLES,
            "back_style": STYLES,
            "fore_texture": textures,
            "back_texture": textures,
            "fore_family": len(FAMILIES),
            "back_family": len(FAMILIES),
            **palettes,
        }

    def batch(self, step: int, rank: int, count: int, size: int) -> Batch:
        """`count` images of `size` pixels."""
        draw = Draw(self.seed, step, rank, device=self.device)
        plan = self._plan(draw, count)
        fore_texture, back_texture = self._textures(draw, plan.tiles, size)
        layers = self._foreground(draw, plan.shape, plan.variant, plan.instances, size)
        layers = layers * plan.present.view(-1, 1, 1, 1)
        coverage, relief, part = layers[:, :1], layers[:, 1:2], layers[:, 2:] * layers[:, :1]

        back = self._ground(draw, back_texture, plan.back_style, plan.palettes[2], size)
        back = self._distance(draw, back, size)
        back = back * (1 - draw.uniform(0, 0.5, count, 1, 1, 1) * shifted(blur(coverage, 5), draw))
        fore = self._material(draw, fore_texture, relief, plan.fore_style, plan.palettes[0])
        mixed = 0.25 * fore_texture + 0.75 * relief
        fore = torch.lerp(fore, self._paint(draw, mixed, plan.palettes[1]), part)
        fore = fore * (1 + emboss(coverage * (0.4 + relief), draw))
        clean = develop(illuminate(torch.lerp(back, fore, coverage), draw), draw)
        return Batch(
            images=photograph(clean, draw),
            clean=clean,
            coverage=torch.cat([coverage, part], 1),
            labels=self._labels(plan, part),
            descriptor=self.descriptors[plan.shape, plan.variant] * plan.present[:, None],
        )

    def _plan(self, draw: Draw, n: int) -> Plan:
        """What the n images of a batch are to show."""
        shape = draw.integers(len(self.kind), n)
        variant = draw.integers(self.descriptors.shape[1], n)
        present = ~draw.chance(0.18, n)
        tiles = draw.integers(len(self.textures), 2, n)
        palettes = draw.integers(PALETTES, 3, n)
        fore_style, back_style = (draw.choice(shares, n) for shares in (FORE_STYLES, BACK_STYLES))
        # Without a foreground, a smooth background would leave nothing to see.
        back_style = torch.where(present, back_style, STYLES - 1)
        instances = draw.integers(INSTANCES, n) * draw.chance(0.4, n) + 1
        return Plan(shape, variant, present, instances, tiles, palettes, fore_style, back_style)

    def _labels(self, plan: Plan, part: Tensor) -> dict[str, Tensor]:
        """ABSENT where there is no foreground, no texture, or too little of the second material."""

        def where(known: Tensor, label: Tensor) -> Tensor:
            return torch.where(known, label, ABSENT)

        present, shape = plan.present, plan.shape
        fore, back = present & (plan.fore_style == STYLES - 1), plan.back_style == STYLES - 1
        parted = present & (part.mean((1, 2, 3)) > 0.03)
        elongation = torch.bucketize(self.descriptors[shape, plan.variant, -2], self.bins)
        return {
            "shape": where(present, shape),
            "kind": torch.where(present, self.kind[shape], len(KINDS)),
            "lobes": where(present & (self.lobes[shape] > 0), self.lobes[shape]),
            "hollow": where(present, self.hollow[shape]),
            "elongation": where(present, elongation),
            "instances": plan.instances * present,
            "fore_style": where(present, plan.fore_style),
            "back_style": plan.back_style,
            "fore_texture": where(fore, plan.tiles[0]),
            "back_texture": where(back, plan.tiles[1]),
            "fore_family": where(fore, self.family[plan.tiles[0]]),
            "back_family": where(back, self.family[plan.tiles[1]]),
            "fore_palette": where(present, plan.palettes[0]),
            "part_palette": where(parted, plan.palettes[1]),
            "back_palette": plan.palettes[2],
        }

    def _textures(self, draw: Draw, tiles: Tensor, size: int) -> Tensor:
        """Grey fields (2, n, 1, size, size) in [0, 1] of the two textures of each image."""
        flat = tiles.flatten()
        chosen = self.textures[flat, draw.integers(self.textures.shape[1], len(flat))]
        views = draw.views(len(flat), (1.2, 2.4), 0.35, 0.3, 0.15)
        seen = sample(chosen[:, None].float() / 255, views, size, "reflection")
        return seen.view(2, -1, 1, size, size)

    def _shapes(
        self,
        draw: Draw,
        shape: Tensor,
        variant: Tensor,
        zoom: tuple[float, float],
        shift: float,
        size: int,
    ) -> Tensor:
        """(n, 3, size, size): coverage, relief, part of shapes in random poses."""
        masks = self.masks[2 if size <= 64 else 1]
        views = draw.views(len(shape), zoom, math.pi, shift, 0.3)
        return sample(masks[shape, variant].float() / 255, views, size, "zeros")

    def _foreground(
        self, draw: Draw, shape: Tensor, variant: Tensor, instances: Tensor, size: int
    ) -> Tensor:
        """One to three instances of a shape, the first one large and in front."""
        layers = self._shapes(draw, shape, variant, (0.7, 1.4), 0.3, size)
        for number in range(2, INSTANCES + 1):
            repeated = (instances >= number).nonzero().flatten()
            another = self._shapes(draw, shape[repeated], variant[repeated], (0.4, 0.9), 0.9, size)
            front = layers[repeated]
            layers[repeated] = front + (1 - front[:, :1]) * another
        return layers

    def _distance(self, draw: Draw, back: Tensor, size: int) -> Tensor:
        """Plainer shapes behind the foreground in a third of the images, half of them defocused."""
        chosen = draw.chance(0.35, len(back)).nonzero().flatten()
        n = len(chosen)
        other = draw.integers(len(self.kind), n)
        variant = draw.integers(self.descriptors.shape[1], n)
        layers = self._shapes(draw, other, variant, (0.4, 1.2), 0.9, size)
        colour = self._paint(draw, layers[:, 1:2], draw.integers(PALETTES, n))
        far = torch.lerp(back[chosen], colour, layers[:, :1])
        soft = draw.chance(0.5, n).view(-1, 1, 1, 1)
        back = back.clone()
        back[chosen] = torch.where(soft, blur(far, 5), far)
        return back

    def _ground(
        self, draw: Draw, texture: Tensor, style: Tensor, palette: Tensor, size: int
    ) -> Tensor:
        """The background: a smooth gradient, the texture out of focus, or the texture itself."""
        n, width = len(style), 7 if size <= 64 else 11
        smooth = sample(draw.uniform(0, 1, n, 1, 3, 3), _whole(n, self.device), size, "border")
        style = style.view(-1, 1, 1, 1)
        field = torch.where(style == 1, blur(texture, width), texture)
        field = torch.where(style == 0, smooth, field)
        return self._paint(draw, field, palette)

    def _material(
        self, draw: Draw, texture: Tensor, relief: Tensor, style: Tensor, palette: Tensor
    ) -> Tensor:
        """The foreground's surface: nearly plain, shaded along the relief, or textured."""
        style = style.view(-1, 1, 1, 1)
        share = draw.uniform(0, 0.6, len(style), 1, 1, 1)
        level = draw.uniform(0.1, 0.9, len(style), 1, 1, 1)
        shaded = torch.where(style == 0, level + 0.15 * (relief - 0.5), relief)
        field = torch.where(style == 2, texture + share * (relief - texture), shaded)
        return self._paint(draw, field, palette)

    def _paint(self, draw: Draw, field: Tensor, palette: Tensor) -> Tensor:
        """A grey field (n, 1, h, w) coloured along a palette's three nodes, in either direction."""
        n = len(palette)
        nodes = self.palettes[palette] + 0.05 * draw.normal(n, 1, 3) + 0.04 * draw.normal(n, 3, 3)
        nodes = torch.where(draw.chance(0.5, n, 1, 1), nodes, nodes.flip(1))[..., None, None]
        low, high = (1 - 2 * field).clamp(0, 1), (2 * field - 1).clamp(0, 1)
        return low * nodes[:, 0] + (1 - low - high) * nodes[:, 1] + high * nodes[:, 2]


def _palettes(draw: Draw) -> Tensor:
    """(PALETTES, 3 nodes, RGB): a hue and its neighbours, dark to light, muted to vivid."""
    hue, vivid = draw.uniform(0, 1, PALETTES, 1), draw.uniform(0, 1, PALETTES, 1)
    value, contrast = draw.uniform(0.25, 0.95, PALETTES, 1), draw.uniform(0.2, 0.8, PALETTES, 1)
    hues = hue + draw.normal(PALETTES, 3) * draw.uniform(0, 0.2, PALETTES, 1)
    saturation = (vivid + 0.2 * draw.normal(PALETTES, 3)).clamp(0, 1)
    steps = torch.tensor([-0.5, 0.0, 0.5], device=draw.device)
    return hsv_to_rgb(hues % 1, saturation, (value + contrast * steps).clamp(0.02, 1))


def _whole(n: int, device: torch.device) -> Tensor:
    """Views (n, 2, 3) that change nothing."""
    return torch.eye(2, 3, device=device).expand(n, 2, 3)
