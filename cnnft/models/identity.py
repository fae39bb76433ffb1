"""`Identity`: what is needed to build the same network again; and what input it expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import timm

from cnnft.config.choices import Fit
from cnnft.data.transforms import InputSpec
from cnnft.errors import UsageError

_FORBIDDEN_ARGS = frozenset(
    {"cache_dir", "checkpoint_path", "num_classes", "pretrained", "pretrained_cfg"}
    | {"pretrained_cfg_overlay", "weights"}
)

_LARGEST_ARGUMENT = 10**6

CROP_MODE_OF_FIT: dict[Fit, str] = {"crop": "center", "squash": "squash", "pad": "border"}
"""timm's words for ours."""
_FIT_OF_CROP_MODE = {mode: fit for fit, mode in CROP_MODE_OF_FIT.items()}


@dataclass(frozen=True)
class Identity:
    """Everything that is needed to build the same network again and to find its weights."""

    name: str
    """In full: resnet18.a1_in1k, torchvision/resnet18@IMAGENET1K_V1, builtin, local-dir:PATH."""
    library: Literal["timm", "torchvision"]
    architecture: str
    tag: str = ""
    """The pretrained weights' name in the library: a1_in1k, IMAGENET1K_V1."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments, such as pad_type."""
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    """timm's description of the weights; the form that its config.json has."""

    def __post_init__(self) -> None:
        """Raises `ValueError`: a description may come from anywhere, and must only describe."""
        texts = (self.name, self.library, self.architecture, self.tag)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name is no text")
        if not isinstance(self.model_args, dict) or not isinstance(self.pretrained_cfg, dict):
            raise ValueError("the arguments are no JSON object")
        if not _is_known(self.library, self.architecture):
            raise ValueError(f"{self.library} has no classifier {self.architecture[:50]!r}")
        if forbidden := sorted(_FORBIDDEN_ARGS & self.model_args.keys()):
            raise ValueError(f"a model description may not set {forbidden[0]}")
        if any(abs(number) > _LARGEST_ARGUMENT for number in _numbers(self.model_args)):
            raise ValueError(f"an argument is larger than {_LARGEST_ARGUMENT:,}")


def _is_known(library: str, architecture: str) -> bool:
    """Whether it is one of the names that are built here: others would be fetched from a hub."""
    if library == "torchvision":
        return architecture in torchvision_names()
    return library == "timm" and timm.is_model(architecture)


def _numbers(value: object) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


def torchvision_names() -> list[str]:
    import torchvision.models

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def input_spec(identity: Identity) -> InputSpec:
    """What the library says that the weights expect."""
    if identity.library == "torchvision":
        from torchvision.models import get_model_weights

        preset = get_model_weights(identity.architecture)[identity.tag].transforms()
        size, resize = preset.crop_size[0], preset.resize_size[0]
        return InputSpec(
            size=size,
            crop_fraction=size / resize,
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
    config = timm.data.resolve_data_config(pretrained_cfg=identity.pretrained_cfg)
    channels, height, width = config["input_size"]
    if not all(isinstance(extent, int) for extent in (channels, height, width)):
        raise ValueError("input_size makes no sense")
    if channels != 3 or height != width:
        raise UsageError(
            f"backbone {identity.name} takes {channels} × {height} × {width} pixels: "
            "only square RGB input is supported"
        )
    return InputSpec(
        size=height,
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=_FIT_OF_CROP_MODE.get(config["crop_mode"], "crop"),
    )
