"""Objectives: what training minimises."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, one_hot

from cnnft.config.optimization import DISTILL_WEIGHT, TEMPERATURE, LossConfig
from cnnft.data.sampler import IGNORED

Objective = Callable[..., Tensor]
"""(logits (B, C), labels (B,) or class probabilities (B, C)[, soft targets: a teacher's logits
(B, C)]) -> summed loss of the batch, scalar; images labelled IGNORED add nothing."""


def make_objective(config: LossConfig, counts: Sequence[int]) -> Objective:
    """Cross-entropy or focal loss, and distillation; `counts` are the training images per class."""
    class_weights = balanced_weights(counts) if config.class_weights == "balanced" else None
    temperature = config.temperature or TEMPERATURE
    distill_weight = config.distill_weight or DISTILL_WEIGHT

    def supervised(logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if class_weights is None else class_weights.to(logits)
        if config.focal:
            targets = smoothed(labels, logits.shape[1], config.label_smoothing)
            return focal_loss(logits, targets, config.focal, weights)
        return cross_entropy(
            logits, labels, weights, label_smoothing=config.label_smoothing, reduction="sum"
        )

    def objective(logits: Tensor, labels: Tensor, soft_targets: Tensor | None = None) -> Tensor:
        if soft_targets is None:
            return supervised(logits, labels)
        soft = distillation(logits, soft_targets, is_counted(labels), temperature)
        return (1 - distill_weight) * supervised(logits, labels) + distill_weight * soft

    return objective


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """(C,): N / (C · n_c), inverse class frequencies, so that all classes weigh the same.

    The mean weight of an image is 1: dividing a batch's loss by its images, rather than by their
    weights, keeps the learning rate's meaning and needs no all-reduce.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    weights = images.sum() / (len(counts) * images)
    return weights.where(images > 0, 0.0)  # all images of a class may be copies of another's


def is_counted(labels: Tensor) -> Tensor:
    """(B,): 0 for images that are IGNORED, else 1."""
    return labels != IGNORED if labels.ndim == 1 else torch.ones_like(labels[:, 0])


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Label smoothing: class probabilities (B, C), uniform in part (Szegedy et al., 2016)."""
    if labels.ndim == 1:
        targets = one_hot(labels.clamp(min=0), classes) * is_counted(labels)[:, None]
    else:
        targets = labels
    return targets * (1 - smoothing) + targets.sum(dim=1, keepdim=True) * smoothing / classes


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float, class_weights: Tensor | None = None
) -> Tensor:
    """Focal loss -Σ w_c t_c (1 - p_c)^gamma log p_c, summed, for class probabilities t (B, C).

    It down-weights examples that are already classified well (Lin et al., 2017).
    """
    log_probs = logits.log_softmax(dim=1)
    # Not 0, where a power below 1 has no finite derivative.
    missing = (-log_probs.expm1()).clamp(min=torch.finfo(logits.dtype).tiny)
    terms = -targets * missing**gamma * log_probs
    return (terms if class_weights is None else terms * class_weights).sum()


def distillation(
    logits: Tensor, soft_targets: Tensor, counted: Tensor, temperature: float
) -> Tensor:
    """T² · KL(teacher ‖ student) of softmax at temperature T, summed over what is `counted` (B,).

    `soft_targets` are the teacher's logits (B, C). The square keeps gradients as large as those of
    the labels (Hinton, Vinyals and Dean, 2015).
    """
    student = (logits / temperature).log_softmax(dim=1)
    teacher = (soft_targets.to(logits) / temperature).log_softmax(dim=1)
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (divergence * counted).sum()
