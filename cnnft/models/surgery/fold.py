"""BatchNorm folding: fused into the convolution or linear layer that it directly follows.

Both are linear where the running statistics are fixed, so the layer with other weights does for
both (but for rounding), and activations pass through memory once less. Which follows which is seen
on an example, and what changes the example's logits is left as it is.
"""

from collections.abc import Collection

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from cnnft.models.surgery.substitute import substituted
from cnnft.models.surgery.trace import Call, example, small_first, trace

_TOLERANCE = 1e-4
"""Of the largest logit."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)


def folded(network: nn.Module, size: int, changing: Collection[str] = ()) -> nn.Module:
    """For inference: the same function of images of size × size pixels, computed quicker.

    What is not folded is shared with `network`, which is left in eval mode. `changing`: as for
    `folds`.
    """
    return substituted(network, folds(network, size, changing)).eval()


def folds(network: nn.Module, size: int, changing: Collection[str] = ()) -> dict[str, nn.Module]:
    """Path of a module -> what takes its place; empty where nothing can be folded.

    `changing`: names of tensors that training changes, so that their layers stay as they are. The
    network is left in eval mode.
    """
    network.eval()
    trained = {name.rpartition(".")[0] for name in changing}
    if not any(_is_norm(m) for path, m in network.named_modules() if path not in trained):
        return {}
    # Layers follow each other alike at any size.
    return small_first(size, lambda side: _folds(network, trained, example(network, side)))


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # a GPU's would hide what is compared
@torch.no_grad()
def _folds(network: nn.Module, trained: set[str], pixels: Tensor) -> dict[str, nn.Module]:
    pairs, expected = _watch(network, pixels)
    modules: dict[str, nn.Module] = {}
    for layer, norm in pairs:
        first, second = network.get_submodule(layer), network.get_submodule(norm)
        hooked = first._forward_hooks or second._forward_hooks  # their own outputs are wanted too
        if not hooked and not trained & {layer, norm}:
            modules |= {layer: _fuse(first, second), norm: _what_remains(second)}
    if not modules or not isinstance(expected, Tensor) or not expected.any():
        return {}
    found = substituted(network, modules)(pixels)
    same = (found - expected).abs().max() <= _TOLERANCE * expected.abs().max()
    return modules if same else {}


def _is_norm(module: nn.Module) -> bool:
    return type(module) in _NORMS and module.running_var is not None


def _watch(network: nn.Module, pixels: Tensor) -> tuple[list[tuple[str, str]], object]:
    """(paths of each layer and the normalisation that its output enters at once, the logits)."""
    layers = {p: m for p, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    norms = {p: m for p, m in network.named_modules() if _is_norm(m)}
    calls, logits = trace(network, pixels, layers | norms)
    pairs: list[tuple[str, str]] = []
    last: Call | None = None
    for call in calls:
        if call.path in layers:
            last = call
        elif last is not None and call.entered is last.output:
            pairs.append((last.path, call.path))
    return pairs, logits


def _fuse(layer: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(norm, _BatchNorm)
    if isinstance(layer, nn.Conv2d):
        return fuse_conv_bn_eval(layer, norm)
    assert isinstance(layer, nn.Linear)
    return fuse_linear_bn_eval(layer, norm)


def _what_remains(norm: nn.Module) -> nn.Module:
    """timm has layers that normalise and then activate."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
