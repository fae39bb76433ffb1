"""Which tensors are the head, and what kind of head it is."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnnft.config.choices import HeadInit
from cnnft.errors import UsageError


def head_tensors(network: nn.Module, rebuild: Callable[[int], nn.Module]) -> frozenset[str]:
    """Names of the head's tensors in `network.state_dict()`.

    `rebuild(classes)` makes the same network for another number of classes, 0 meaning without a
    classifier where the library knows that. The head is every module with a tensor that comes out
    in another shape, and every tensor that 0 leaves out, such as a normalisation before the
    classifier. This asks no network which architecture it is.
    """
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    classes = max(shape[0] for shape in shapes.values() if shape)  # differs from the present number
    changed = _differ(shapes, _on_meta(rebuild, classes + 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without outputs
            removed = shapes.keys() - _on_meta(rebuild, 0).keys()
    except Exception:  # not every network can be built without a classifier
        removed = set()
    return frozenset(changed | removed)


def _on_meta(rebuild: Callable[[int], nn.Module], classes: int) -> dict[str, Tensor]:
    try:
        with torch.device("meta"):  # costs no memory
            return rebuild(classes).state_dict()
    except RuntimeError:  # torchvision's RegNets compute their widths with tensors
        return rebuild(classes).state_dict()


def _differ(shapes: dict[str, torch.Size], other: dict[str, Tensor]) -> set[str]:
    return {name for name in shapes if name not in other or other[name].shape != shapes[name]}


def without_head(state: dict[str, Tensor], head: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in head}


def _owners(head: frozenset[str]) -> list[str]:
    """Paths of the modules that hold the head's tensors."""
    return sorted({name.rpartition(".")[0] for name in head})


def classifier_layer(network: nn.Module, head: frozenset[str]) -> tuple[str, nn.Module]:
    """(path, module) of the head's last layer: auxiliary classifiers come before it."""
    paths = [name.rpartition(".")[0] for name in network.state_dict() if name in head]
    return paths[-1], network.get_submodule(paths[-1])


def head_before(network: nn.Module, head: Iterable[str]) -> frozenset[str]:
    """The head's tensors in `network`, if layers that take the places of some make it `head`."""
    places = {name: name.rpartition(".")[0] + "." for name in network.state_dict()}
    return frozenset(n for n, place in places.items() if any(h.startswith(place) for h in head))


def replace_by_mlp(network: nn.Module, head: frozenset[str]) -> frozenset[str]:
    """Put a hidden layer, as wide as the features, before the classifier; returns the new head.

    Raises:
        UsageError: the classifier is no linear layer.
    """
    path, layer = classifier_layer(network, head)
    parallel = [other for other in _owners(head) if other != path and "aux" not in other.lower()]
    if not isinstance(layer, nn.Linear) or parallel:
        raise UsageError(
            f"--head mlp: this backbone's classifier {path} is no single linear layer: leave it as "
            "it is"
        )
    width = layer.in_features
    mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, layer.out_features))
    network.set_submodule(path, mlp)
    others = {name for name in head if name.rpartition(".")[0] != path}
    return frozenset(others | {f"{path}.{name}" for name in mlp.state_dict()})


def initialise(network: nn.Module, head: frozenset[str], how: HeadInit) -> None:
    """Draw the head's weights anew.

    default: as torch initialises such layers, whatever the network's authors did: some scale by
    the number of classes, and with two of them the first losses are ten times too large. xavier:
    Glorot and Bengio, 2010; kaiming: He et al., 2015; these and zeros have biases of zero.
    """
    for path in _owners(head):
        layer = network.get_submodule(path)
        reset: Any = getattr(layer, "reset_parameters", None)
        if reset is not None:
            reset()
    if how == "default":
        return
    draw: dict[str, Callable[[Tensor], Tensor]] = {
        "xavier": nn.init.xavier_uniform_,
        "kaiming": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="linear"),
        "zeros": nn.init.zeros_,
    }
    for name, parameter in network.named_parameters():
        if name in head and parameter.ndim > 1:
            draw[how](parameter)
        elif name in head and name.endswith("bias"):
            nn.init.zeros_(parameter)


def add_dropout(network: nn.Module, head: frozenset[str], p: float) -> None:
    """Dropout on what enters the head's layers, in train mode; no tensor changes its name."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout(inputs[0], p, module.training), *inputs[1:])

    for path in _owners(head):
        layer = network.get_submodule(path)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_pre_hook(drop)
