"""Which parameters train, and what frozen layers do meanwhile."""

from torch import nn

from cnnft.config import Mode


def freeze(network: nn.Module, head: frozenset[str], mode: Mode) -> None:
    """Set `requires_grad`: of all parameters, or in feature-extractor mode of the head's alone."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(mode == "finetune" or name in head)


def train_mode(network: nn.Module) -> None:
    """Like `network.train()`, but a module whose parameters are all frozen stays in eval mode.

    Frozen BatchNorm layers then use, and keep, their pretrained statistics, and dropout or
    stochastic depth inside a frozen backbone stay off: its features are a function of the image.
    """
    network.train()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
