"""Formulas of research/pilots.py by hand, and that its loop trains as cnnft does."""

import numpy as np
import pytest
import torch
from torch import nn

from cnnft import Config, finetune, load
from cnnft.probe.solve import fit
from cnnft.probe.solve import solve as own
from cnnft.training.plan import prepare
from research.pilots import (
    FineTuning,
    by_bayes,
    co_tuning,
    interpolated,
    l2_sp,
    mixed_with,
    mixup,
    nothing,
    relationship,
    solve,
    within_class_noise,
)


def test_co_tunings_relationship():
    # Of pretrained class 0 three quarters are of the class 0, of pretrained class 1 a half.
    conditional = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    found = by_bayes(conditional, torch.tensor([0.4, 0.6]))
    # Joint: 0.3, 0.1; 0.3, 0.3.
    assert found.allclose(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))


def test_a_relationship_is_learnt_from_probabilities():
    sure = torch.eye(3)[[0, 1, 2] * 10]  # the pretrained classes 1 and 2 are the second class
    found = relationship(sure, torch.tensor([0, 1, 1] * 10))
    assert found.allclose(torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]), atol=0.01)


def test_co_tunings_objective():
    objective = co_tuning(torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]), weight=2.0)
    labels = torch.tensor([1])
    own = objective(torch.zeros(1, 2), labels)
    other = objective(torch.tensor([[0.0, 1.0, 0.0]]), labels)
    log_sum = np.log(2 + np.e)
    assert own.item() == pytest.approx(np.log(2))
    # The training step weighs an auxiliary classifier's loss by 0.4.
    assert 0.4 * other.item() == pytest.approx(2 * (0.5 * (log_sum - 1) + 0.5 * log_sum))


def test_l2_sps_penalty():
    layers = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for parameter, value in zip(layers.parameters(), (3.0, 5.0), strict=True):
        nn.init.constant_(parameter, value)
    penalty = l2_sp(layers, {"0.weight": torch.tensor([[1.0]])}, alpha=0.5, beta=0.1)
    assert penalty.item() == pytest.approx(0.25 * 2**2 + 0.05 * 5**2)
    penalty.backward()
    assert [p.grad.item() for p in layers.parameters()] == pytest.approx([0.5 * 2, 0.1 * 5])


def test_interpolation_of_weights():
    start = {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(0)}
    end = {"weight": torch.tensor([3.0, -2.0]), "steps": torch.tensor(7)}
    found = interpolated(start, end, 0.25)
    assert found["weight"].tolist() == [1.5, 1.0]
    assert found["steps"] == 7


def test_the_loop_is_that_of_cnnft_and_wise_ft_ends_at_its_ends(flat, tmp_path):
    settings = {"backbone": "builtin", "image_size": 32, "epochs": 2, "batch_size": 8, "workers": 0}
    settings |= {"mode": "finetune", "device": "cpu", "runs_dir": tmp_path}
    tuning = FineTuning(prepare(Config.of(flat, **settings)))
    start, *epochs = tuning.run()
    for share, end in ((0, start), (1, epochs[-1])):
        mixed = mixed_with(tuning, start, epochs[-1], share)
        assert mixed.found == end.found
        counters = [name for name in end.tensors if name.endswith("num_batches_tracked")]
        assert all(mixed.tensors[n].equal(end.tensors[n]) for n in end.tensors if n not in counters)
    run = finetune(flat, **settings)
    chosen = min([start, *epochs], key=lambda weights: weights.found.calibrated_loss)
    network = load(run.path).network.state_dict()
    assert all(network[name].equal(tensor) for name, tensor in chosen.tensors.items())


def test_heads_are_solved_as_cnnft_does_and_what_is_added_has_its_spread():
    random = np.random.default_rng(0)
    labels = torch.arange(2).repeat(30)
    values = torch.tensor(random.normal(size=(1, 60, 4)) + labels[None, :, None].numpy()).float()
    folds = torch.arange(60) // 2 % 5
    linear, temperature = solve(values, labels, 2, folds, nothing)
    expected = own(values, labels, 2, folds)
    assert temperature == expected.temperature
    assert linear.weight.allclose(expected.linear.weight)
    assert expected.chosen is not None
    assert linear.weight.allclose(fit(values, labels, 2, expected.chosen.penalty).weight)

    wide = torch.tensor(random.normal(size=(600, 2))) * torch.tensor([1.0, 3.0])
    targets = torch.eye(2).double().repeat(300, 1)
    wide[::2] += 100  # between the classes, which the noise leaves out
    noisy, of = within_class_noise(0.5)((wide, targets), random)
    assert (noisy - wide).std(dim=0).tolist() == pytest.approx([0.5, 1.5], rel=0.15)
    assert of is targets
    mixed, of = mixup(1)((wide, targets), random)
    assert of.sum(dim=1).allclose(torch.ones(600).double())
    assert ((mixed[:, 0] - 100 * of[:, 0]).abs() < 6).all()
