"""A classifier described as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from torch import Tensor, nn

from cnnft import __version__
from cnnft.config.choices import Head
from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError, first_line
from cnnft.inference.calibrate import HIGHEST
from cnnft.inference.classifier import Classifier, Description, Member
from cnnft.machine.files import known
from cnnft.models.build import build_undrawn, numbers_held, try_out
from cnnft.models.heads import head_before, replace_by_mlp
from cnnft.models.hub import Pin
from cnnft.models.identity import CROP_MODE_OF_FIT, Identity
from cnnft.models.surgery.stagehead import put_on_stages

FORMAT = 2
"""Of the description below; raised when an older cnnft could not read it."""
_MOST_SNAPSHOTS = 1000
_LONGEST_PATH = 4096


def describe(classifier: Classifier) -> dict[str, Any]:
    """All but the tensors, as JSON values; timm reads what is outside "cnnft" too."""
    identity = asdict(classifier.identity)
    config: dict[str, Any] = {
        "architecture": identity.pop("architecture"),
        "num_classes": len(classifier.classes),
        "model_args": identity.pop("model_args"),
        "pretrained_cfg": identity.pop("pretrained_cfg") | _timm_config(classifier),
    }
    config["cnnft"] = {
        "format": FORMAT,
        "version": __version__,
        "classes": list(classifier.classes),
        "input_spec": asdict(classifier.input_spec),
        "head": sorted(classifier.head),
        "head_kind": classifier.head_kind,
        "stages": list(classifier.stages),
        "temperature": classifier.temperature,
        "snapshots": classifier.snapshots,
        "members": [asdict(member) for member in classifier.members],
        "backbone": {
            **identity,
            "weights_source": classifier.weights_source,
            "missing": list(classifier.missing),
            "sha256": classifier.pretrained_hash,
        },
        "weights_file": None if classifier.pin is None else asdict(classifier.pin),
    }
    return config


def _timm_config(classifier: Classifier) -> dict[str, Any]:
    # Not num_classes: this stays a description of the pretrained weights, which a head file
    # fetches again; timm takes the number of classes from the top of the file.
    spec = classifier.input_spec
    return {
        "label_names": list(classifier.classes),
        "input_size": [3, spec.size, spec.size],
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_fraction,
        "crop_mode": CROP_MODE_OF_FIT[spec.fit],
        "mean": list(spec.mean),
        "std": list(spec.std),
    }


def parse_description(config: dict[str, Any], source: Path) -> Description:
    """What `describe` said; what a newer cnnft of the same format says beside it is ignored.

    Raises:
        CnnftError: not such a description, or one of a newer format.
    """
    try:
        own = config["cnnft"]
        if own["format"] > FORMAT:
            raise CnnftError(
                f"{source} was written by cnnft {str(own['version'])[:20]}: update cnnft"
            )
        backbone, spec, pin = own["backbone"], own["input_spec"], own.get("weights_file")
        found = Description(
            classes=_names("classes", own["classes"]),
            input_spec=InputSpec(
                **known(InputSpec, spec) | {name: tuple(spec[name]) for name in ("mean", "std")}
            ),
            identity=Identity(
                **known(Identity, backbone)
                | {name: config[name] for name in ("architecture", "model_args", "pretrained_cfg")}
            ),
            head=frozenset(_names("head", own["head"])),
            head_kind=own.get("head_kind", "linear"),
            stages=_names("stages", own.get("stages", [])),
            weights_source=backbone["weights_source"],
            missing=_names("missing", backbone["missing"]),
            pretrained_hash=backbone["sha256"],
            temperature=_temperature(own.get("temperature", 1.0)),
            snapshots=own.get("snapshots", 0),
            members=_members(own.get("members", [])),
            pin=Pin(**known(Pin, pin)) if pin else None,
        )
        if found.head_kind not in get_args(Head):
            raise ValueError("head_kind is unknown")
        if found.stages and found.head_kind != "linear":
            raise ValueError("a head on stages is linear")
        if not isinstance(found.snapshots, int) or not 0 <= found.snapshots <= _MOST_SNAPSHOTS:
            raise ValueError("the number of snapshots makes no sense")
        source_is_text = isinstance(found.weights_source, str | None)
        if not source_is_text or not isinstance(found.pretrained_hash, str):
            raise TypeError("weights_source and sha256 of the backbone must be strings")
        if len(found.weights_source or "") > _LONGEST_PATH:
            raise ValueError("weights_source is longer than a path can be")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CnnftError(
            f"{source} does not describe a cnnft classifier ({first_line(error)})"
        ) from error
    return found


def _temperature(value: Any) -> float:
    if type(value) not in (int, float) or not 1 / HIGHEST <= value <= HIGHEST:
        raise ValueError(f"the temperature is no number from {1 / HIGHEST:g} to {HIGHEST:g}")
    return float(value)


def _members(values: Any) -> tuple[Member, ...]:
    members = tuple(Member(str(of["folder"]), float(of["weight"])) for of in values)
    for member in members:
        parts = PurePosixPath(member.folder).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError("a member of the ensemble lies outside the run")
    if not all(of.weight > 0 for of in members) or sum(of.weight for of in members) >= 1:
        raise ValueError("the weights of the ensemble make no sense")
    return members


def from_description(
    config: dict[str, Any], source: Path, state: Mapping[str, Tensor]
) -> Classifier:
    """The classifier that `describe` described, without weights (zeros, mostly).

    `state` is what will fill it, or its head alone.

    Raises:
        CnnftError: not such a description, one from a newer cnnft, or one of a larger network.
    """
    found = parse_description(config, source)
    identity, classes = found.identity, len(found.classes)
    try:
        held, given = numbers_held(identity, classes), sum(t.numel() for t in state.values())
        # `fill` compares exactly; this is so that no absurd network is made for it.
        if held > 2 * given and state.keys() != found.head:
            raise CnnftError(
                f"{source} does not fit the network it names: that holds {held:,} numbers, and "
                f"its weights are {given:,}"
            )
        network = build_undrawn(identity, classes)
        if identity.model_args:  # some that make no sense show only when it computes
            try_out(network, found.input_spec.size)
        network = _with_head(network, found)
    except CnnftError:
        raise
    except Exception as error:  # whatever the library says of arguments that it does not know
        raise CnnftError(
            f"{source}: {identity.architecture} cannot be built ({first_line(error)})"
        ) from error
    return Classifier(network=network, **vars(found))


def _with_head(network: nn.Module, found: Description) -> nn.Module:
    """`network` has a single linear layer; raises what is wrong with another head."""
    if found.head_kind == "linear" and not found.stages:
        return network
    head = head_before(network, found.head)
    if found.stages:
        return put_on_stages(network, head, found.stages, found.input_spec.size)[0]
    replace_by_mlp(network, head)
    return network


def _names(what: str, values: object) -> tuple[str, ...]:
    """Raises `ValueError`: not a list of different strings."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{what} must be a list of strings")
    if len(set(values)) != len(values):
        raise ValueError(f"{what} lists one twice")
    return tuple(values)
