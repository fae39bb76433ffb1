"""A classifier described as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from cnnft import __version__
from cnnft.config.choices import Head
from cnnft.data.transforms import InputSpec
from cnnft.errors import CnnftError, first_line
from cnnft.inference.classifier import Classifier
from cnnft.models.build import build, numbers_held, try_out
from cnnft.models.heads import head_tensors, replace_by_mlp
from cnnft.models.hub import Pin
from cnnft.models.identity import CROP_MODE_OF_FIT, Identity

FORMAT = 1
"""Of the description below; raised when an older cnnft could not read it."""
_MOST_SNAPSHOTS = 1000


def describe(classifier: Classifier) -> dict[str, Any]:
    """All but the tensors, as JSON values; timm reads what is outside "cnnft" too."""
    identity = classifier.identity.to_dict()
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
        "snapshots": classifier.snapshots,
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


def from_description(
    config: dict[str, Any], source: Path, state: Mapping[str, Tensor]
) -> Classifier:
    """The classifier that `Classifier.describe` described, with random weights.

    `state` is what will fill it, or its head alone.

    Raises:
        CnnftError: not such a description, one from a newer cnnft, or one of a larger network.
    """
    try:
        own = config["cnnft"]
        if own["format"] > FORMAT:
            raise CnnftError(
                f"{source} was written by cnnft {str(own['version'])[:20]}: update cnnft"
            )
        backbone = dict(own["backbone"])
        weights_source, pretrained_hash = backbone.pop("weights_source"), backbone.pop("sha256")
        missing = _texts(backbone.pop("missing"))
        identity = Identity(
            architecture=config["architecture"],
            model_args=config["model_args"],
            pretrained_cfg=config["pretrained_cfg"],
            **backbone,
        )
        values = own["input_spec"]
        statistics = {name: tuple(values[name]) for name in ("mean", "std")}
        spec = InputSpec(**values | statistics)
        classes = _texts(own["classes"])
        head, head_kind = frozenset(_texts(own["head"])), own.get("head_kind", "linear")
        if head_kind not in get_args(Head):
            raise ValueError("head_kind is unknown")
        snapshots = own.get("snapshots", 0)
        if not isinstance(snapshots, int) or not 0 <= snapshots <= _MOST_SNAPSHOTS:
            raise ValueError("the number of snapshots makes no sense")
        pin = Pin(**own["weights_file"]) if own.get("weights_file") else None
        if not isinstance(weights_source, str | None) or not isinstance(pretrained_hash, str):
            raise TypeError("the backbone's weights are no text")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CnnftError(
            f"{source} does not describe a cnnft classifier ({first_line(error)})"
        ) from error
    try:
        held, given = numbers_held(identity, len(classes)), sum(t.numel() for t in state.values())
        # `fill` compares exactly; this is so that no absurd network is made for it.
        if held > 2 * given and state.keys() != head:
            raise CnnftError(
                f"{source} does not fit the network it names: that holds {held:,} numbers, and "
                f"its weights are {given:,}"
            )
        network = build(identity, len(classes))
        if identity.model_args:  # some that make no sense show only when it computes
            try_out(network, spec.size)
        if head_kind == "mlp":
            replace_by_mlp(network, head_tensors(network, lambda other: build(identity, other)))
    except CnnftError:
        raise
    except Exception as error:  # whatever the library says of arguments that it does not know
        raise CnnftError(
            f"{source}: {identity.architecture} cannot be built ({first_line(error)})"
        ) from error
    return Classifier(
        network,
        classes,
        spec,
        identity,
        head,
        head_kind,
        weights_source,
        missing,
        pretrained_hash,
        snapshots,
        pin,
    )


def _texts(values: object) -> tuple[str, ...]:
    """Raises `ValueError`: no list of different names."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of names is none")
    if len(set(values)) != len(values):
        raise ValueError("a list of names has one twice")
    return tuple(values)
