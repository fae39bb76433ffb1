"""An `Identity` -> a network, of bounded size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from cnnft.models.identity import Identity
from cnnft.models.registry import ONE_SIZE

_PRETRAINED_AUXILIARY = {"inception_v3"}
"""torchvision's weights of GoogLeNet come with auxiliary classifiers that were never trained."""
_MOST_TENSORS = 5_000
"""Of parameters; the libraries' deepest network has fewer than 2,000."""
_DRAWN: frozenset[Any] = frozenset(
    {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_}
    | {init.kaiming_normal_, init.kaiming_uniform_, init.xavier_normal_, init.xavier_uniform_}
)
"""What fills a tensor with random numbers."""


class _Undrawn(TorchFunctionMode):
    """Zeros instead of random numbers: of millions they take longer than all else in a network."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if function not in _DRAWN:
            return function(*args, **named)
        with torch.no_grad():
            return (args[0] if args else named["tensor"]).zero_()


def build_undrawn(identity: Identity, classes: int) -> nn.Module:
    """As `build`, to be filled or for its shapes: zeros where that has random weights."""
    with _Undrawn():
        return build(identity, classes)


@torch.random.fork_rng(devices=[])
def build(identity: Identity, classes: int) -> nn.Module:
    """The network with random weights, a function of torch's CPU generator, which stays as it is,
    and a head for `classes` classes.

    Raises:
        Exception: whatever the library says of arguments that it does not know.
    """
    network: nn.Module
    if identity.library == "torchvision":
        from torchvision.models import get_model

        network = get_model(
            identity.architecture, weights=None, num_classes=classes, **identity.model_args
        )
    else:
        network = timm.create_model(
            identity.architecture,
            pretrained_cfg=identity.pretrained_cfg,
            num_classes=classes,
            **identity.model_args,
        )
    return network


def try_out(network: nn.Module, size: int) -> None:
    """A forward pass of one image of size × size pixels; raises what the network says."""
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, size, size))


def numbers_held(identity: Identity, classes: int) -> int:
    """The number of parameters and of elements in buffers, found on the meta device; 0: not known.

    Raises:
        ValueError: more than this machine has memory for, or tensors without end.
        Exception: whatever the library says of arguments that it does not know.
    """
    tensors = count(1)

    def stop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(tensors) > _MOST_TENSORS:
            raise ValueError(f"it has more than {_MOST_TENSORS:,} tensors")

    watching = register_module_parameter_registration_hook(stop)
    try:
        with torch.device("meta"):
            state = build_undrawn(identity, classes).state_dict()
    except (RuntimeError, NotImplementedError):  # some compute their widths with tensors
        return 0
    finally:
        watching.remove()
    held = sum(tensor.numel() for tensor in state.values())
    try:
        torch.empty(held)  # asked for and given back; memory that is not used costs nothing
    except RuntimeError as error:
        raise ValueError(f"it holds {held:,} numbers, which do not fit into memory") from error
    return held


def at_size(identity: Identity, size: int) -> Identity:
    """The same backbone for images of `size` pixels: some networks are built for one size."""
    if identity.library == "torchvision":
        fixed, name = identity.architecture.startswith(ONE_SIZE), "image_size"
    else:
        fixed, name = bool(identity.pretrained_cfg.get("fixed_input_size")), "img_size"
    return replace(identity, model_args=identity.model_args | {name: size}) if fixed else identity


def with_auxiliary(identity: Identity) -> Identity:
    """With the auxiliary classifiers, where pretrained weights have them."""
    if identity.library == "timm" or identity.architecture not in _PRETRAINED_AUXILIARY:
        return identity
    return replace(identity, model_args=identity.model_args | {"aux_logits": True})


def with_drop_path(identity: Identity, share: float) -> Identity:
    """With stochastic depth (drop path); networks that know no such argument stay as they are."""
    name = "drop_path_rate" if identity.library == "timm" else "stochastic_depth_prob"
    changed = replace(identity, model_args=identity.model_args | {name: share})
    try:
        with torch.device("meta"):
            build_undrawn(changed, 2)
    except TypeError:
        return identity
    return changed


def skips_blocks(network: nn.Module) -> bool:
    return any(isinstance(module, DropPath | StochasticDepth) for module in network.modules())
