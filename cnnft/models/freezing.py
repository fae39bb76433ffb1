"""Which parameters train, and in which mode (train or eval) frozen layers run meanwhile."""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnnft.config.choices import BatchNorm, Mode
from cnnft.errors import UsageError


def freeze(
    network: nn.Module,
    head: frozenset[str],
    stages: Sequence[Sequence[str]],
    mode: Mode,
    train_stages: int | None = None,
) -> None:
    """Set `requires_grad` of all parameters: of `trained_parameters` and the head it is true."""
    trained = trained_parameters(network, head, stages, mode, train_stages)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in head or name in trained)


def trained_parameters(
    network: nn.Module,
    head: frozenset[str],
    stages: Sequence[Sequence[str]],
    mode: Mode,
    train_stages: int | None = None,
) -> Set[str]:
    """Names of the parameters that train besides the head.

    finetune trains the last `train_stages` stages (None: all), bn-only the scales and shifts of
    normalisation layers (Frankle, Schwab and Morcos, 2021), feature-extractor nothing.

    Raises:
        UsageError: there are fewer stages, or no normalisation layer.
    """
    if train_stages is not None and train_stages > len(stages):
        raise UsageError(
            f"--train-stages {train_stages} is out of range: this backbone has {len(stages)} stages"
        )
    if mode == "bn-only":
        if trained := _normalisations(network) - head:
            return trained
        raise UsageError("--mode bn-only: this backbone has no normalisation layers to train")
    if mode == "finetune":
        first = 0 if train_stages is None else len(stages) - train_stages
        return {name for stage in stages[first:] for name in stage}
    return set()


def _normalisations(network: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if "norm" in type(module).__name__.lower()  # timm has many of its own
        for name, _ in module.named_parameters(recurse=False)
    }


Modes = list[tuple[nn.Module, bool]]
"""Each module of a network, and whether it is in train mode."""


def train_mode(network: nn.Module, keep_statistics: Iterable[nn.Module] = ()) -> None:
    """Put it into the mode that it trains in."""
    restore_modes(network, train_modes(network, keep_statistics))


def restore_modes(network: nn.Module, modes: Modes) -> None:
    if any(module.training != training for module, training in modes):
        network.train()  # some networks forget here what they have cached
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile, then in the modes that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        restore_modes(network, modes)


def train_modes(network: nn.Module, keep_statistics: Iterable[nn.Module] = ()) -> Modes:
    """All in train mode, but what comes before the last frozen parameter in eval mode.

    Frozen BatchNorm layers then use, and keep, their pretrained statistics, and dropout or
    stochastic depth among frozen layers stay off: their features are a function of the image. A
    layer whose own parameters train is in train mode wherever it stands. A container is in train
    mode if nothing in it is frozen. `keep_statistics`: trained layers to leave in eval mode too.
    """
    modules = list(network.modules())
    frozen = [
        position
        for position, module in enumerate(modules)
        if any(not parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    last_frozen = max(frozen, default=-1)
    kept = set(keep_statistics)
    modes = []
    for position, module in enumerate(modules):
        if own := list(module.parameters(recurse=False)):
            trains = any(parameter.requires_grad for parameter in own)
        elif inner := list(module.parameters()):
            trains = all(parameter.requires_grad for parameter in inner)
        else:
            trains = position > last_frozen
        modes.append((module, trains and module not in kept))
    return modes


def changing(network: nn.Module, keep: Iterable[nn.Module] = ()) -> list[str]:
    """Names of its tensors that training changes: trained parameters, and running statistics.

    The network is left in train mode.
    """
    train_mode(network, keep)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    paths = {path for path, module in network.named_modules() if module.training}
    buffers = {name for name, _ in network.named_buffers() if name.rpartition(".")[0] in paths}
    return [name for name in network.state_dict() if name in trained or name in buffers]


def learning_statistics(network: nn.Module, keep: Iterable[nn.Module] = ()) -> list[str]:
    """Names of the BatchNorm layers whose running statistics change in training."""
    train_mode(network, keep)
    modules = network.named_modules()
    return [name for name, m in modules if isinstance(m, _BatchNorm) and m.training]


def batchnorms(network: nn.Module, head: frozenset[str]) -> list[nn.Module]:
    """The backbone's BatchNorm layers; those of a new head have no statistics to keep."""
    owners = {name.rpartition(".")[0] for name in head}
    return [
        module
        for path, module in network.named_modules()
        if isinstance(module, _BatchNorm) and path not in owners
    ]


SMALL_BATCH = 8
"""Below this the statistics of a batch are too noisy for BatchNorm (Wu and He, 2018)."""


def freezes_statistics(batchnorm: BatchNorm, pretrained: bool, batch: int) -> bool:
    """Whether BatchNorm layers that train keep their pretrained running statistics.

    `batch`: how many images the layers see at once.
    """
    if batchnorm == "auto":
        return pretrained and batch < SMALL_BATCH
    return batchnorm == "frozen"
