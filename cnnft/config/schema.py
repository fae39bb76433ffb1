"""`Config`: what a training run is asked to do, validated, in sections. Standard library only."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cnnft.config.network import FEATURE_VIEWS, FreezingConfig, NetworkConfig
from cnnft.config.optimization import (
    AveragingConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from cnnft.config.options import flag_of, option_of, validate
from cnnft.config.pixels import AugmentationConfig, InputConfig
from cnnft.config.rules import contradictions
from cnnft.config.run import DataConfig, MachineConfig, RunConfig
from cnnft.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Every setting of `finetune`; one that is out of range raises `UsageError` on construction.

    Users name settings flat (`--lr`, `lr = 0.01` in config.toml): `Config.of` and `to_dict`.
    Functions take the section that they need.
    """

    dataset: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    freezing: FreezingConfig = field(default_factory=FreezingConfig)
    input: InputConfig = field(default_factory=InputConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            validate(getattr(self, section.name))
        for sentence in contradictions(self):
            raise UsageError(sentence)

    @classmethod
    def of(cls, data: str | Path, **settings: Any) -> Self:
        """From flat settings: `Config.of("photos", epochs=5, lr=1e-3)`."""
        return cls.from_dict({"data": data, **settings}, "settings")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """From flat settings; `source` is named where one is unknown or data is absent."""
        if unknown := sorted(values.keys() - FIELDS.keys()):
            raise UsageError(f"{source}: unknown setting {unknown[0]!r:.100}")
        if "data" not in values:
            raise UsageError(f"{source}: no data folder is given")
        sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
        for name, value in values.items():
            is_list = isinstance(value, list) and name == "teacher"  # as a config file has it
            sections[SECTION_OF[name]][name] = tuple(value) if is_list else value
        return cls(**{name: _SECTIONS[name](**given) for name, given in sections.items()})

    def replace(self, **settings: Any) -> Self:
        """With other flat settings."""
        return self.from_dict({**self._flat(), **settings}, "settings")

    def to_dict(self) -> dict[str, Any]:
        """Flat, as a run saves it: plain values only, absent where None; `from_dict` reads it."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self._flat().items()
            if value is not None and option_of(FIELDS[name]).saved
        }

    def _flat(self) -> dict[str, Any]:
        return {name: getattr(getattr(self, s), name) for name, s in SECTION_OF.items()}

    @property
    def views(self) -> int | None:
        """How many augmented views of each image training has; None: a new one in every epoch.

        Where layers are frozen and a view comes again, its features are cached.
        """
        views, epochs = self.freezing.feature_views, self.training.epochs
        if self.freezing.mode == "feature-extractor" and not self.augmentation.mixes:
            return min(views or FEATURE_VIEWS, epochs)
        return None if views is None else min(views, epochs)

    @property
    def balanced(self) -> bool:
        """Whether training weighs all classes equally, whatever their numbers of images."""
        return "balanced" in (self.loss.class_weights, self.training.sampling)


_SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
SECTION_OF = {
    field.name: section for section, cls in _SECTIONS.items() for field in dataclasses.fields(cls)
}
"""Flat name of a setting -> the section that has it."""
FIELDS: dict[str, "dataclasses.Field[Any]"] = {
    field.name: field for cls in _SECTIONS.values() for field in dataclasses.fields(cls)
}
"""Flat name of a setting -> its declaration."""


def flag(name: str) -> str:
    """How the user knows the setting: by its flag, or by its name in a config file."""
    return flag_of(FIELDS[name]) if name in FIELDS else "--" + name.replace("_", "-")
