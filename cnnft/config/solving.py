"""When the head on a frozen backbone is solved rather than trained by steps."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cnnft.config.options import flag_of

if TYPE_CHECKING:
    from cnnft.config.schema import Config

_ALL = None
_OF_STEPS = {
    "optim": _ALL,
    "schedule": _ALL,
    "averaging": _ALL,
    "augmentation": _ALL,
    "loss": _ALL,
    "training": ("micro_batch", "patience", "skip_nonfinite"),
    "network": ("head", "head_init", "dropout"),
    "freezing": ("feature_views",),
}
_OF_WHAT_TRAINS = {
    "network": ("pretrained", "drop_path"),
    "freezing": ("train_stages", "probe_first", "batchnorm"),
    "machine": ("sync_bn",),
}
_FOR_BOTH = ("class_weights",)


def frozen(config: "Config") -> bool:
    """Whether no layer of the backbone trains."""
    freezing = config.freezing
    return freezing.mode == "feature-extractor" or freezing.train_stages == 0


def about_steps(config: "Config") -> list[str]:
    """Flags of the settings that are not as by default, and mean something to steps alone."""
    return _changed(config, _OF_STEPS)


def against_auto(config: "Config") -> list[str]:
    """Flags of the settings, not as by default, that mode auto has no use for: they say how steps
    are taken, or what trains.
    """
    return _changed(config, _OF_STEPS) + _changed(config, _OF_WHAT_TRAINS)


def _changed(config: "Config", names: Mapping[str, tuple[str, ...] | None]) -> list[str]:
    """Flags of those of the named settings, by section, that are not as by default."""
    return [
        flag_of(field)
        for section, chosen in names.items()
        for field in dataclasses.fields(getattr(config, section))
        if (chosen is _ALL or field.name in chosen) and field.name not in _FOR_BOTH
        if getattr(getattr(config, section), field.name) != field.default
    ]


def solves_head(config: "Config") -> bool:
    """Whether the head is a logistic regression on frozen features: there are no epochs."""
    solver = config.freezing.head_solver
    return frozen(config) and (solver == "lbfgs" or (solver == "auto" and not about_steps(config)))
