"""The generated world of research/pretrain: reproducible, in range, in shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from research.pretrain.bank import DESCRIPTORS, KINDS, BankSpec, describe, load
from research.pretrain.objective import DENSE, WEIGHTS, Objective, colour_histogram, dense_targets
from research.pretrain.textures import FAMILIES
from research.pretrain.train import image_size, learning_rate
from research.pretrain.world import ABSENT, World

SPEC = BankSpec(
    shapes=len(KINDS), shape_variants=2, textures=len(FAMILIES), texture_variants=2, size=64
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    bank = load(SPEC, tmp_path_factory.mktemp("bank"))
    return World(bank, seed=3, device=torch.device("cpu"))


def test_bank_is_cached_and_varied(tmp_path: Path) -> None:
    first, second = load(SPEC, tmp_path), load(SPEC, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(first.masks, second.masks)
    assert np.array_equal(first.textures, second.textures)
    assert not np.array_equal(first.masks[:, 0], first.masks[:, 1])
    assert (first.masks[:, :, 0].mean((2, 3)) > 2).all()
    assert (first.textures.std((2, 3)) > 5).all()


def test_a_batch_is_a_function_of_seed_step_and_rank(world: World) -> None:
    batch, again = (world.batch(5, 1, 4, 32) for _ in range(2))
    assert torch.equal(batch.images, again.images)
    assert all(torch.equal(batch.labels[k], again.labels[k]) for k in batch.labels)
    for step, rank in ((6, 1), (5, 0)):
        assert not torch.equal(batch.images, world.batch(step, rank, 4, 32).images)


@pytest.mark.parametrize("size", [32, 96])
def test_targets_are_in_range(world: World, size: int) -> None:
    batch = world.batch(0, 0, 24, size)
    assert batch.images.shape == batch.clean.shape == (24, 3, size, size)
    assert batch.coverage.shape == (24, 2, size, size)
    assert batch.descriptor.shape == (24, DESCRIPTORS)
    assert batch.images.isfinite().all()
    assert batch.clean.min() >= 0 and batch.clean.max() <= 1
    assert batch.coverage.min() >= -1e-5 and batch.coverage.max() <= 1 + 1e-5
    assert set(batch.labels) == set(world.classes)
    for name, labels in batch.labels.items():
        assert labels.shape == (24,)
        assert labels.min() >= ABSENT and labels.max() < world.classes[name], name


def test_every_question_has_a_weight_and_a_gradient(world: World) -> None:
    objective = Objective(world.classes, features=8)
    cells = torch.randn(16, 8, 2, 2, requires_grad=True)
    batch = world.batch(1, 0, 16, 64)
    loss, seen = objective(cells, batch)
    loss.backward()
    assert set(WEIGHTS) <= set(seen)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert dense_targets(batch, 2).shape == (16, DENSE, 2, 2)
    assert torch.allclose(colour_histogram(batch.clean).sum(1), torch.ones(16))


def test_the_descriptor_ignores_turning_and_mirroring(world: World) -> None:
    coverage = world.masks[1][0, 0, 0].numpy() / 255.0
    assert np.allclose(describe(coverage), describe(np.rot90(coverage)), atol=0.12)
    assert np.allclose(describe(coverage), describe(coverage[:, ::-1]), atol=0.12)


def test_the_schedule_warms_up_stays_and_decays() -> None:
    rates = [learning_rate(step, 10_000, 1.0) for step in range(10_000)]
    assert rates[0] < 0.01 and rates[5000] == 1.0 and rates[-1] < 0.01
    assert [image_size(step, 100) for step in (0, 99)] == [64, 128]
