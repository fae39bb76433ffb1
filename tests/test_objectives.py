"""Losses, against torch's and against their formulas."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot, softmax

from cnnft.config.optimization import LossConfig
from cnnft.data.sampler import IGNORED
from cnnft.training.losses import (
    balanced_weights,
    distillation,
    focal_loss,
    is_counted,
    make_objective,
    smoothed,
)

torch.manual_seed(0)
LOGITS = torch.randn(6, 3, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, IGNORED, 0])
COUNTS = (4, 1, 10)


def objective(**settings):
    return make_objective(LossConfig(**settings), COUNTS)


def test_without_settings_it_is_the_cross_entropy_of_the_images_that_count():
    expected = cross_entropy(LOGITS, LABELS, reduction="sum")
    assert torch.equal(objective()(LOGITS, LABELS), expected)


def test_balanced_weights_make_classes_count_alike_and_images_1_in_the_mean():
    weights, counts = balanced_weights(COUNTS), torch.tensor(COUNTS)
    assert (weights * counts).tolist() == pytest.approx([5.0, 5.0, 5.0])
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)
    loss = objective(class_weights="balanced", label_smoothing=0.1)(LOGITS, LABELS)
    expected = cross_entropy(LOGITS, LABELS, weights, label_smoothing=0.1, reduction="sum")
    assert float(loss) == pytest.approx(float(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, balanced_weights(COUNTS)])
def test_focal_loss_with_gamma_0_is_cross_entropy(smoothing, weight):
    shares = smoothed(LABELS, 3, smoothing)
    expected = cross_entropy(LOGITS, LABELS, weight, label_smoothing=smoothing, reduction="sum")
    assert float(focal_loss(LOGITS, shares, 0.0, weight)) == pytest.approx(float(expected))


def test_focal_loss_has_the_formula_of_its_paper():
    expected = 0.0
    for row, label in zip(softmax(LOGITS, dim=1).tolist(), LABELS.tolist(), strict=True):
        if label != IGNORED:
            expected -= (1 - row[label]) ** 2 * math.log(row[label])
    assert float(objective(focal=2)(LOGITS, LABELS)) == pytest.approx(expected)


def test_focal_loss_has_gradients_where_an_image_is_surely_right():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([[1.0, 0.0]]), 0.5).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"focal": 1.5}, {"class_weights": "balanced"}])
def test_mixed_labels_have_the_two_target_form(settings):
    """λ · loss(a) + (1 - λ) · loss(b): cross-entropy and focal loss are linear in the labels."""
    a, b, share = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 0, 2, 0, 2]), 0.3
    mixed = share * one_hot(a, 3).double() + (1 - share) * one_hot(b, 3).double()
    loss = objective(**settings)
    expected = share * loss(LOGITS, a) + (1 - share) * loss(LOGITS, b)
    assert float(loss(LOGITS, mixed)) == pytest.approx(float(expected))


def test_distillation_has_hintons_formula():
    taught, temperature = torch.randn(6, 3, dtype=torch.float64), 3.0
    expected = 0.0
    for z, t, label in zip(LOGITS, taught, LABELS.tolist(), strict=True):
        if label != IGNORED:
            q, p = softmax(t / temperature, dim=0), softmax(z / temperature, dim=0)
            expected += temperature**2 * float((q * (q / p).log()).sum())
    found = distillation(LOGITS, taught, is_counted(LABELS), temperature)
    assert float(found) == pytest.approx(expected)


def test_distillation_at_temperature_1_has_the_gradient_of_the_teachers_probabilities():
    taught = torch.randn(6, 3, dtype=torch.float64)
    gradients = []
    for loss in (
        lambda z: distillation(z, taught, torch.ones(6), 1.0),
        lambda z: cross_entropy(z, softmax(taught, dim=1), reduction="sum"),
    ):
        logits = LOGITS.clone().requires_grad_()
        loss(logits).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_the_weight_of_distillation_goes_from_the_labels_alone_to_the_teacher_alone():
    taught = torch.randn(6, 3, dtype=torch.float64)
    settings = {"teacher": ("t",), "temperature": 2.0}
    labels = objective()(LOGITS, LABELS)
    teacher = distillation(LOGITS, taught, is_counted(LABELS), 2.0)
    for weight in (1e-9, 0.25, 1.0):
        found = objective(**settings, distill_weight=weight)(LOGITS, LABELS, taught)
        assert float(found) == pytest.approx(float((1 - weight) * labels + weight * teacher))
