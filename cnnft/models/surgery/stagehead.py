"""A head on several stages: a linear layer on their pooled outputs and on what enters the head."""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from cnnft.errors import first_line
from cnnft.models.freezing import evaluating
from cnnft.models.heads import classifier_layer
from cnnft.models.surgery.cut import Cut
from cnnft.models.surgery.embed import pooled
from cnnft.models.surgery.trace import EXAMPLES, Call, example, same_output, small_first, trace

SIZES = 2
"""Stages of so many sizes of map, the smallest, enter the head; earlier ones make it worse."""


class UnitBlocks(nn.Module):
    """Scales each block of features (B, D) to length 1, so that none outweighs the others."""

    def __init__(self, widths: Sequence[int]) -> None:
        """`widths` of the blocks, D in sum."""
        super().__init__()
        self.widths = list(widths)

    def forward(self, features: Tensor) -> Tensor:
        blocks = features.split(self.widths, dim=1)
        return torch.cat([F.normalize(block, dim=1) for block in blocks], dim=1)

    def extra_repr(self) -> str:
        return repr(self.widths)


class StageHead(nn.Module):
    """(B, D) that enters the head -> logits (B, C), by one linear layer on it and on the pooled
    outputs of stages, which forward hooks note as the network computes them.
    """

    def __init__(self, paths: Sequence[str], widths: Sequence[int], classes: int) -> None:
        """`paths` of the modules whose outputs are noted; `widths` of these, pooled, and of what
        enters the head.
        """
        super().__init__()
        self.paths = tuple(paths)
        self.unit = UnitBlocks(widths)
        # Not drawn: it will be drawn as other heads are, or filled.
        self.linear = skip_init(nn.Linear, sum(widths), classes)
        self._noted: dict[str, Tensor] = {}

    def note(self, path: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        """A forward hook, which as a bound method of this goes with a deep copy of the network."""
        self._noted[path] = pooled(output)  # at once: an activation may write over it

    def forward(self, features: Tensor) -> Tensor:
        blocks = [self._noted.pop(path) for path in self.paths]
        logits: Tensor = self.linear(self.unit(torch.cat([*blocks, features], dim=1)))
        return logits

    def __getstate__(self) -> dict[str, object]:
        """No copy has what a pass that was cut short left: it may be in a graph of gradients."""
        return self.__dict__ | {"_noted": {}}


def put_on_stages(
    network: nn.Module, head: frozenset[str], paths: Sequence[str], size: int
) -> tuple[nn.Module, frozenset[str]]:
    """(a network whose classifier is on the modules at `paths` too, names of its head's tensors).

    `head`: those of `network`. All other tensors are shared; the new layer's are not drawn yet.
    Images have size × size pixels.

    Raises:
        ValueError: one of the paths is no module whose output can be pooled, or the classifier is
            no linear layer of vectors.
    """
    tensors = [*network.parameters(), *network.buffers()]
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    place, layer = classifier_layer(network, head)
    if len(set(paths)) != len(paths) or {"", place} & set(paths):
        raise ValueError("a stage of the head is listed twice, or is no stage")
    try:
        modules = {path: network.get_submodule(path) for path in paths}
    except AttributeError as error:
        raise ValueError(f"a stage of the head is not there: {first_line(error)}") from error
    calls = {call.path: call for call in _calls(network, modules | {place: layer}, size)}
    if not isinstance(layer, nn.Linear) or place not in calls or calls[place].entered.ndim != 2:
        raise ValueError("the classifier is no linear layer of vectors")
    if not all(path in calls and _can_be_pooled(calls[path]) for path in paths):
        raise ValueError("a stage of the head has no output that can be pooled")
    blocks = [*(_pooled(calls[path]) for path in paths), calls[place].entered]
    joined = StageHead(paths, [block.shape[1] for block in blocks], layer.out_features)
    for path, module in modules.items():
        module.register_forward_hook(partial(joined.note, path))
    network.set_submodule(place, joined.to(layer.weight))
    others = {name for name in head if name.rpartition(".")[0] != place}
    return network, frozenset(others | {f"{place}.{name}" for name in joined.state_dict()})


def head_stages(network: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose pooled outputs enter the head; none, where the head is another."""
    return next((m.paths for m in network.modules() if isinstance(m, StageHead)), ())


def stage_cut(network: nn.Module) -> Cut:
    """Where the blocks enter a head on stages, side by side, before each has length 1.

    Raises:
        ValueError: the head is another.
    """
    heads = [path for path, m in network.named_modules() if isinstance(m, StageHead)]
    if not heads:
        raise ValueError("its head is not on several stages")
    return Cut(f"{heads[0]}.unit", frozenset())


def find_stages(
    network: nn.Module, stages: Sequence[Sequence[str]], head: str, size: int
) -> tuple[str, ...]:
    """Paths of the modules whose pooled outputs can enter a head beside what enters it already.

    The last stage of each of the two smallest sizes of map, or the last two of a network of one
    size. `stages`: names of each one's parameters, input side first. `head`: path of the head.
    """
    modules = dict(network.named_modules())
    del modules[""]
    calls = _calls(network, modules, size)
    entered = next((call.entered for call in reversed(calls) if call.path == head), None)
    ends = [end for stage in stages if (end := _end(calls, modules, frozenset(stage)))]
    sizes = [list(group) for _, group in groupby(ends, key=_map_size)]
    if len(sizes) == 1:  # it has one size of map throughout
        sizes = [[end] for end in ends]
    new = [[e for e in group if not same_output(_pooled(e), entered)] for group in sizes[-SIZES:]]
    return tuple(group[-1].path for group in new if group)


def _end(calls: list[Call], modules: dict[str, nn.Module], stage: frozenset[str]) -> Call | None:
    """What a stage ends with, where that can be pooled: the last of its outermost modules."""
    inside = [call for call in calls if _lies_in(modules[call.path], call.path, stage)]
    paths = {call.path for call in inside}
    outermost = [call for call in inside if paths.isdisjoint(_above(call.path))]
    # A stage may end in single layers, such as the convolution before the head.
    blocks = [call for call in outermost if _holds_layers(modules[call.path])] or outermost
    return blocks[-1] if blocks and _can_be_pooled(blocks[-1]) else None


def _lies_in(module: nn.Module, path: str, stage: frozenset[str]) -> bool:
    names = {f"{path}.{name}" for name, _ in module.named_parameters()}
    return bool(names) and names <= stage


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _holds_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _can_be_pooled(call: Call) -> bool:
    """Whether it is a vector, tokens or a map of each image."""
    output = call.output
    return isinstance(output, Tensor) and 2 <= output.ndim <= 4 and len(output) == EXAMPLES


def _pooled(call: Call) -> Tensor:
    assert isinstance(call.output, Tensor)
    return pooled(call.output)


def _map_size(call: Call) -> object:
    """The number of places of a map; tokens and vectors are each of a size of their own."""
    assert isinstance(call.output, Tensor)
    if call.output.ndim < 4:
        return call.path
    return call.output[0].numel() // _pooled(call).shape[1]


def _calls(network: nn.Module, modules: dict[str, nn.Module], size: int) -> list[Call]:
    with torch.no_grad(), evaluating(network):
        return small_first(size, lambda side: trace(network, example(network, side), modules)[0])
