"""Losses: what training makes small."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, one_hot

from cnnft.config.optimization import LossConfig
from cnnft.data.sampler import IGNORED

Objective = Callable[..., Tensor]
"""(logits (B, C), labels (B,) or shares of the classes (B, C)[, a teacher's logits (B, C)]) ->
summed loss of the batch, scalar; images labelled IGNORED have none."""

TEMPERATURE = 4.0
DISTILL_WEIGHT = 0.5


def make_objective(config: LossConfig, counts: Sequence[int]) -> Objective:
    """What `config` asks for; `counts` are the training images of each class."""
    weight = balanced_weights(counts) if config.class_weights == "balanced" else None
    temperature = config.temperature or TEMPERATURE
    taught_share = config.distill_weight or DISTILL_WEIGHT

    def supervised(logits: Tensor, labels: Tensor) -> Tensor:
        by_class = None if weight is None else weight.to(logits)
        if config.focal:
            shares = smoothed(labels, logits.shape[1], config.label_smoothing)
            return focal_loss(logits, shares, config.focal, by_class)
        return cross_entropy(
            logits, labels, by_class, label_smoothing=config.label_smoothing, reduction="sum"
        )

    def objective(logits: Tensor, labels: Tensor, taught: Tensor | None = None) -> Tensor:
        if taught is None:
            return supervised(logits, labels)
        soft = distillation(logits, taught, counted(labels), temperature)
        return (1 - taught_share) * supervised(logits, labels) + taught_share * soft

    return objective


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """(C,): N / (C · n_c), so that every class weighs the same in the sum over the N images.

    The mean weight of an image is 1: dividing a batch's loss by its images, rather than by their
    weights, keeps the learning rate's meaning and needs no sum over processes.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    return images.sum() / (len(counts) * images)


def counted(labels: Tensor) -> Tensor:
    """(B,): 0 for images that are IGNORED, else 1."""
    return labels != IGNORED if labels.ndim == 1 else torch.ones_like(labels[:, 0])


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Shares of the classes (B, C), of which all get `smoothing` alike (Szegedy et al., 2016)."""
    if labels.ndim == 1:
        shares = one_hot(labels.clamp(min=0), classes) * counted(labels)[:, None]
    else:
        shares = labels
    return shares * (1 - smoothing) + shares.sum(dim=1, keepdim=True) * smoothing / classes


def focal_loss(
    logits: Tensor, shares: Tensor, gamma: float, weight: Tensor | None = None
) -> Tensor:
    """-Σ w_c t_c (1 - p_c)^gamma log p_c, summed (Lin et al., 2017), for shares t (B, C)."""
    log_probs = logits.log_softmax(dim=1)
    # Not 0, where a power below 1 has no finite derivative.
    missing = (-log_probs.expm1()).clamp(min=torch.finfo(logits.dtype).tiny)
    terms = -shares * missing**gamma * log_probs
    return (terms if weight is None else terms * weight).sum()


def distillation(logits: Tensor, taught: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student), of softmax at temperature T, summed over what is `counted` (B,).

    The square keeps gradients as large as those of the labels (Hinton, Vinyals and Dean, 2015).
    """
    student = (logits / temperature).log_softmax(dim=1)
    teacher = (taught.to(logits) / temperature).log_softmax(dim=1)
    divergence = kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (divergence * counted).sum()
