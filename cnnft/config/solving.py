"""When the head on a frozen backbone is solved rather than trained by steps."""

import dataclasses
from typing import TYPE_CHECKING

from cnnft.config.options import flag_of

if TYPE_CHECKING:
    from cnnft.config.schema import Config

_SECTIONS = ("optim", "schedule", "averaging", "augmentation", "loss")
_OTHERS = {
    "training": ("micro_batch", "patience", "skip_nonfinite"),
    "network": ("head", "head_init", "dropout"),
    "freezing": ("feature_views",),
}
_FOR_BOTH = ("class_weights",)


def frozen(config: "Config") -> bool:
    """Whether no layer of the backbone trains."""
    freezing = config.freezing
    return freezing.mode == "feature-extractor" or freezing.train_stages == 0


def about_steps(config: "Config") -> list[str]:
    """Flags of the settings that are not as by default, and mean something to steps alone."""
    names = {section: _OTHERS.get(section) for section in (*_SECTIONS, *_OTHERS)}
    return [
        flag_of(field)
        for section, chosen in names.items()
        for field in dataclasses.fields(getattr(config, section))
        if chosen is None or field.name in chosen
        if field.name not in _FOR_BOTH
        if getattr(getattr(config, section), field.name) != field.default
    ]


_OF_WHAT_TRAINS = {
    "network": ("pretrained", "drop_path"),
    "freezing": ("train_stages", "probe_first", "batchnorm"),
    "machine": ("sync_bn",),
}


def against_auto(config: "Config") -> list[str]:
    """Flags of the settings, not as by default, that mode auto has no use for: they say how steps
    are taken, or what trains.
    """
    return about_steps(config) + [
        flag_of(field)
        for section, names in _OF_WHAT_TRAINS.items()
        for field in dataclasses.fields(getattr(config, section))
        if field.name in names and getattr(getattr(config, section), field.name) != field.default
    ]


def solves_head(config: "Config") -> bool:
    """Whether the head is a logistic regression on frozen features: there are no epochs."""
    solver = config.freezing.head_solver
    return frozen(config) and (solver == "lbfgs" or (solver == "auto" and not about_steps(config)))
