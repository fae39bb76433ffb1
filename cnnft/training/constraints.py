"""L1 penalty and gradient clipping before a step, max-norm constraint after it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from cnnft.config.optimization import OptimizerConfig

Rule = Callable[[], None]


def gradient_rules(network: nn.Module, config: OptimizerConfig) -> Rule:
    """L1 penalty, whose gradient is added, then gradient clipping by the norm of all together.

    L1 applies to the weights that decay: with weight decay an elastic net (Zou and Hastie, 2005).
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    penalised = [p for p in trained if p.ndim > 1 or config.decay_all]

    def apply() -> None:
        if config.l1:
            for parameter in penalised:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach().sign(), alpha=config.l1)
        if config.clip_grad is not None:
            clip_grad_norm_(trained, config.clip_grad)

    return apply


def weight_rules(network: nn.Module, head: frozenset[str], config: OptimizerConfig) -> Rule:
    """Max-norm constraint on each class's weights in the head (Srivastava et al., 2014)."""
    weights = [p for name, p in network.named_parameters() if name in head and p.ndim > 1]

    @torch.no_grad()
    def apply() -> None:
        if config.max_norm is not None:
            for weight in weights:
                weight.copy_(weight.renorm(2, 0, config.max_norm))

    return apply
