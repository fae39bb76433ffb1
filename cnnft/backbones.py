"""A name -> a backbone: the network with a new head, its pretrained weights, its `InputSpec`."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cnnft.errors import UsageError
from cnnft.heads import head_tensors
from cnnft.pretrained import LoadedWeights, load_weights
from cnnft.transforms import InputSpec
from cnnft.zoo import Identity, build, described_beside, input_spec, resolve


@dataclass
class Backbone:
    """A network with a fresh head, its pretrained weights loaded."""

    network: nn.Module
    head: frozenset[str]
    """Names of the head's tensors in the state dict."""
    input_spec: InputSpec
    identity: Identity
    weights: LoadedWeights | None
    """None: random weights."""


def open_backbone(
    name: str, classes: int, *, pretrained: bool = True, weights: str | Path | None = None
) -> Backbone:
    """Build `name` with a new head for `classes` classes and load its weights.

    Args:
        name: a timm name (resnet18, resnet50.a1_in1k), torchvision/NAME, builtin, or
            local-dir:PATH (a folder with timm's config.json and model.safetensors).
        weights: a file to take the backbone's weights from, .safetensors or .pth.

    Raises:
        UsageError: an unknown name, a missing file, weights asked for where there are none.
        CnnftError: a download that fails, a file that cannot be read or is of another network.
    """
    identity = resolve(name)
    if weights is not None:
        identity = described_beside(Path(weights), identity)
    network = build(identity, classes)
    head = head_tensors(network, lambda other: build(identity, other))
    if not head:
        raise UsageError(f"backbone {identity.name} is no classifier: it has no head to replace")
    backbone = Backbone(network, head, input_spec(identity), identity, None)
    if pretrained:
        backbone.weights = load_weights(network, head, identity, weights)
    return backbone
