"""What is done to gradients before a step, and to weights after it."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from cnnft.config.optimization import OptimizerConfig

Rule = Callable[[], None]


def gradient_rules(network: nn.Module, config: OptimizerConfig) -> Rule:
    """The gradient of l1 · Σ|w| is added, then all gradients together are scaled to a norm.

    L1 is of what weight decay is of: together they are an elastic net (Zou and Hastie, 2005).
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    drawn = [p for p in trained if p.ndim > 1 or config.decay_all]

    def apply() -> None:
        if config.l1:
            for parameter in drawn:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach().sign(), alpha=config.l1)
        if config.clip_grad is not None:
            clip_grad_norm_(trained, config.clip_grad)

    return apply


def weight_rules(network: nn.Module, head: frozenset[str], config: OptimizerConfig) -> Rule:
    """No class's weights in the head have a norm above `max_norm` (Srivastava et al., 2014)."""
    weights = [p for name, p in network.named_parameters() if name in head and p.ndim > 1]

    @torch.no_grad()
    def apply() -> None:
        if config.max_norm is not None:
            for weight in weights:
                weight.copy_(weight.renorm(2, 0, config.max_norm))

    return apply
