"""Which parameters train, and what frozen layers do meanwhile."""

from torch import nn

from cnnft.config import Mode


def freeze(network: nn.Module, head: frozenset[str], mode: Mode) -> None:
    """Set `requires_grad`: of all parameters, or in feature-extractor mode of the head's alone."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(mode == "finetune" or name in head)


def train_mode(network: nn.Module) -> None:
    """Like `network.train()`, but all that comes before the last frozen parameter stays in eval.

    Frozen BatchNorm layers then use, and keep, their pretrained statistics, and dropout or
    stochastic depth among frozen layers stay off: their features are a function of the image. A
    layer whose own parameters train is in train mode wherever it stands. A container is in train
    mode if nothing in it is frozen.
    """
    modules = list(network.modules())
    frozen = [
        position
        for position, module in enumerate(modules)
        if any(not parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    last_frozen = max(frozen, default=-1)
    for position, module in enumerate(modules):
        if own := list(module.parameters(recurse=False)):
            module.training = any(parameter.requires_grad for parameter in own)
        elif inner := list(module.parameters()):
            module.training = all(parameter.requires_grad for parameter in inner)
        else:
            module.training = position > last_frozen
