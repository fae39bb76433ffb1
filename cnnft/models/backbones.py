"""A name -> a backbone: the network with a new head, its pretrained weights, its `InputSpec`."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.models.build import (
    at_size,
    build,
    build_undrawn,
    numbers_held,
    skips_blocks,
    try_out,
    with_auxiliary,
    with_drop_path,
)
from cnnft.models.heads import head_tensors, initialise
from cnnft.models.identity import Identity, input_spec
from cnnft.models.registry import described_beside, resolve
from cnnft.models.stages import stages
from cnnft.models.surgery.embed import find_head
from cnnft.models.surgery.stagehead import find_stages, put_on_stages
from cnnft.models.weights import LoadedWeights, load_weights


@dataclass
class Backbone:
    """A network with a fresh head, its pretrained weights loaded."""

    network: nn.Module
    head: frozenset[str]
    """Names of the head's tensors in the state dict."""
    stages: tuple[tuple[str, ...], ...]
    """Names of the backbone's parameters, input side first."""
    input_spec: InputSpec
    identity: Identity
    weights: LoadedWeights | None
    """None: random weights."""


def open_backbone(
    name: str,
    classes: int,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    image_size: int | None = None,
    auxiliary: bool = False,
    drop_path: float = 0.0,
) -> Backbone:
    """Build `name` with a new head for `classes` classes and load its weights.

    Args:
        name: a timm name (resnet18, resnet50.a1_in1k), torchvision/NAME, builtin,
            hf-hub:OWNER/NAME, or local-dir:PATH (a folder with timm's config.json and
            model.safetensors).
        weights: a file to take the backbone's weights from, .safetensors or .pth.
        image_size: side in pixels, if another than the one of the pretraining.
        auxiliary: with the auxiliary classifiers that were pretrained, if there are any.
        drop_path: stochastic depth: the probability that an image skips the last block in
            training, falling linearly towards the first (Huang et al., 2016).

    Raises:
        UsageError: an unknown name, a missing file, weights asked for where there are none.
        CnnftError: a download that fails, a file that cannot be read or is of another network.
    """
    identity = resolve(name, own_weights=weights is not None)
    if weights is not None:
        identity = described_beside(Path(weights), identity)
    identity, spec = _at_size(identity, image_size, auxiliary)
    described = ":" in name  # by a file from anywhere
    # What is skipped in training is no part of the identity: evaluation skips nothing.
    trained = with_drop_path(identity, drop_path) if drop_path else identity
    try:
        numbers_held(identity, classes)
        network = build(trained, classes)
        if described or image_size is not None:
            try_out(network, spec.size)
        head = head_tensors(network, lambda other: build_undrawn(identity, other))
        groups = stages(network, head)
    except Exception as error:  # whatever a network says of what does not fit it
        if image_size is not None:
            raise UsageError(
                f"--image-size {image_size}: backbone {identity.name} cannot take it "
                f"({first_line(error)})"
            ) from error
        raise CnnftError(
            f"backbone {identity.name} cannot be built ({first_line(error)})"
        ) from error
    if drop_path and not skips_blocks(network):
        raise UsageError(f"--drop-path: backbone {identity.name} has no blocks that can be skipped")
    if not head:
        raise UsageError(f"backbone {identity.name} is no classifier: it has no head to replace")
    loaded = load_weights(network, head, identity, weights) if pretrained else None
    return Backbone(network, head, groups, spec, identity, loaded)


def _at_size(
    identity: Identity, image_size: int | None, auxiliary: bool
) -> tuple[Identity, InputSpec]:
    """The identity and input for images of that size; None: of the pretraining's."""
    spec = input_spec(identity)
    pretrained_size = spec.size
    if image_size is not None:
        identity = at_size(identity, image_size)
        spec = replace(spec, size=image_size)
    # Smaller images leave maps that the auxiliary classifiers cannot work on.
    if auxiliary and spec.size >= pretrained_size:
        identity = with_auxiliary(identity)
    return identity, spec


def with_stages(backbone: Backbone) -> Backbone | None:
    """The same with a head on its last stages too, drawn anew; all other tensors are shared.

    None where the head is no single linear layer of vectors, or no stage adds to what enters it.
    """
    network, size = backbone.network, backbone.input_spec.size
    place = find_head(network, backbone.head, size)
    if place is None or not place.linear:
        return None
    (path,) = place.paths
    found = find_stages(network, backbone.stages, path, size)
    if not found:
        return None
    try:
        network, head = put_on_stages(network, backbone.head, found, size)
    except ValueError:
        return None
    initialise(network, head, "default")
    return replace(backbone, network=network, head=head)
