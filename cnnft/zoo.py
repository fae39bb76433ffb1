"""The model zoos: a name -> an `Identity`; an `Identity` -> a network and its `InputSpec`."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision.ops import StochasticDepth

from cnnft.config import Fit
from cnnft.errors import CnnftError, UsageError, did_you_mean, first_line
from cnnft.files import parse_json
from cnnft.hub import Remote
from cnnft.transforms import InputSpec

_TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    # The weights were trained on TensorFlow's normalisation, which transform_input restores.
    name: {"transform_input": True, "aux_logits": False, "init_weights": True}
    for name in ("googlenet", "inception_v3")
}

_PRETRAINED_AUXILIARY = {"inception_v3"}
"""torchvision's weights of GoogLeNet come with auxiliary classifiers that were never trained."""

_ONE_SIZE = "vit_"
"""torchvision's networks that are built for one size of image."""

_FORBIDDEN_ARGS = frozenset(
    {"cache_dir", "checkpoint_path", "num_classes", "pretrained", "pretrained_cfg"}
    | {"pretrained_cfg_overlay", "weights"}
)

_LARGEST_ARGUMENT = 10**6
_MOST_TENSORS = 5_000
"""Of parameters; the libraries' deepest network has fewer than 2,000."""

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _is_known(library: str, architecture: str) -> bool:
    """Whether it is one of the names that are built here: others would be fetched from a hub."""
    if library == "torchvision":
        return architecture in _torchvision_names()
    return library == "timm" and timm.is_model(architecture)


def _numbers(value: object) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


def resolve(name: str) -> Identity:
    """Find `name` in its library, without building or downloading anything."""
    if folder := local_folder(name):
        return _from_folder(name, folder)
    if name.startswith("torchvision/"):
        return _from_torchvision(name)
    if name.startswith("hf-hub:"):
        return _from_hub(name)
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"unknown backbone {name!r}{did_you_mean(name, [*names(), 'builtin'])}")
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*") + timm.list_pretrained(architecture)
    if tag and name not in tags:
        raise UsageError(
            f"backbone {architecture} has no weights {tag!r}{did_you_mean(name, tags)}"
        )
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise UsageError(f"timm does not say what input backbone {name} expects: choose another")
    tag = config.tag or ""
    return Identity(
        name=f"{architecture}.{tag}" if tag else architecture,
        library="timm",
        architecture=architecture,
        tag=tag,
        pretrained_cfg=config.to_dict(),
    )


def names() -> list[str]:
    """Every architecture of timm, then every classifier of torchvision, as resolve takes them."""
    return [*timm.list_models(), *(f"torchvision/{name}" for name in _torchvision_names())]


def local_folder(name: str) -> Path | None:
    if name == "builtin":
        return Path(str(files("cnnft") / "weights" / "builtin"))
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    return None


def _from_folder(name: str, folder: Path) -> Identity:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{config_file}: no such file; local-dir: takes a folder in timm's layout")
    if name.startswith("local-dir:"):
        name = f"local-dir:{folder.absolute()}"
    return _described(name, config_file)


def _from_hub(name: str) -> Identity:
    repository = name.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", repository):
        raise UsageError(
            f"backbone {name!r}: give hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION"
        )
    identity = _described(
        name, Remote(f"the description of {name}", repository, ("config.json",)).fetch()
    )
    config = identity.pretrained_cfg | {"hf_hub_id": repository}
    return replace(identity, pretrained_cfg=config)


def _described(name: str, config_file: Path) -> Identity:
    """From a config.json as timm writes it."""
    description = parse_json(config_file.read_bytes(), config_file)
    try:
        config = dict(description["pretrained_cfg"])
        arguments = description.get("model_args") or {}
        if isinstance(arguments, dict):  # timm 1.0.31 writes the number of classes here too
            arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
        identity = Identity(
            name,
            description.get("cnnft", {}).get("backbone", {}).get("library", "timm"),
            description["architecture"],
            config.get("tag", ""),
            arguments,
            {"num_classes": description.get("num_classes", 1000)} | config,
        )
        if identity.library != "timm":
            raise ValueError(f"{identity.architecture} is of {identity.library}, not of timm")
        input_spec(identity)
    except CnnftError:
        raise
    except Exception as error:  # timm raises anything on what it does not expect
        raise CnnftError(
            f"{config_file} is not a timm model description ({first_line(error)})"
        ) from error
    return identity


def described_beside(weights: Path, identity: Identity) -> Identity:
    """The identity in the config.json next to a weights file, if it is of the same architecture.

    It may say what the tensors cannot, such as TensorFlow's padding and normalisation: ignoring it
    costs accuracy without any error.
    """
    if identity.library != "timm":
        return identity
    try:
        found = _from_folder(identity.name, weights.parent)
    except CnnftError:  # no description, or of something else
        return identity
    return found if found.architecture == identity.architecture else identity


def _from_torchvision(name: str) -> Identity:
    from torchvision.models import get_model_weights

    architecture, _, tag = name.removeprefix("torchvision/").partition("@")
    if architecture not in _torchvision_names():
        known = [f"torchvision/{other}" for other in _torchvision_names()]
        raise UsageError(f"unknown backbone {name!r}{did_you_mean(name, known)}")
    options = get_model_weights(architecture)
    if tag and tag not in options.__members__:
        choices = ", ".join(options.__members__)
        raise UsageError(f"torchvision/{architecture} has no weights {tag!r}: choose {choices}")
    tag = options[tag or "DEFAULT"].name
    full = f"torchvision/{architecture}@{tag}"
    model_args = _TORCHVISION_ARGS.get(architecture, {})
    if architecture.startswith(_ONE_SIZE):
        model_args = {"image_size": options[tag].transforms().crop_size[0]}
    return Identity(full, "torchvision", architecture, tag, model_args)


def _torchvision_names() -> list[str]:
    import torchvision.models

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build(identity: Identity, classes: int) -> nn.Module:
    """The network with random weights and a head for `classes` classes.

    Raises:
        Exception: whatever the library says of arguments that it does not know.
    """
    network: nn.Module
    if identity.library == "torchvision":
        from torchvision.models import get_model

        network = get_model(
            identity.architecture, weights=None, num_classes=classes, **identity.model_args
        )
    else:
        network = timm.create_model(
            identity.architecture,
            pretrained_cfg=identity.pretrained_cfg,
            num_classes=classes,
            **identity.model_args,
        )
    return network


def try_out(network: nn.Module, size: int) -> None:
    """Let it compute one image of size × size pixels; raises what the network says."""
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, size, size))


def numbers_held(identity: Identity, classes: int) -> int:
    """How many numbers the network's tensors hold, found without making them; 0: not known.

    Raises:
        ValueError: more than this machine has memory for, or tensors without end.
        Exception: whatever the library says of arguments that it does not know.
    """
    tensors = count(1)

    def stop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(tensors) > _MOST_TENSORS:
            raise ValueError(f"it has more than {_MOST_TENSORS:,} tensors")

    watching = register_module_parameter_registration_hook(stop)
    try:
        with torch.device("meta"):
            state = build(identity, classes).state_dict()
    except (RuntimeError, NotImplementedError):  # some compute their widths with tensors
        return 0
    finally:
        watching.remove()
    held = sum(tensor.numel() for tensor in state.values())
    try:
        torch.empty(held)  # asked for and given back; memory that is not used costs nothing
    except RuntimeError as error:
        raise ValueError(f"it holds {held:,} numbers, which do not fit into memory") from error
    return held


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


def at_size(identity: Identity, size: int) -> Identity:
    """The same backbone for images of `size` pixels: some networks are built for one size."""
    if identity.library == "torchvision":
        fixed, name = identity.architecture.startswith(_ONE_SIZE), "image_size"
    else:
        fixed, name = bool(identity.pretrained_cfg.get("fixed_input_size")), "img_size"
    return replace(identity, model_args=identity.model_args | {name: size}) if fixed else identity


def with_auxiliary(identity: Identity) -> Identity:
    """With the auxiliary classifiers, where pretrained weights have them."""
    if identity.library == "timm" or identity.architecture not in _PRETRAINED_AUXILIARY:
        return identity
    return replace(identity, model_args=identity.model_args | {"aux_logits": True})


def with_drop_path(identity: Identity, share: float) -> Identity:
    """With blocks that are skipped at random; networks that know no such argument stay as is."""
    name = "drop_path_rate" if identity.library == "timm" else "stochastic_depth_prob"
    changed = replace(identity, model_args=identity.model_args | {name: share})
    try:
        with torch.device("meta"):
            build(changed, 2)
    except TypeError:
        return identity
    return changed


def skips_blocks(network: nn.Module) -> bool:
    return any(isinstance(module, DropPath | StochasticDepth) for module in network.modules())


_DEFAULT_FILE = "pytorch_model.bin"
_SAFER_FILE = {
    _DEFAULT_FILE: "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""timm prefers the safetensors file that lies beside one of these."""


def remote_weights(identity: Identity) -> Remote:
    """Where the library's weights of a named backbone come from.

    Raises:
        UsageError: the library has none.
    """
    what, config = f"the weights of {identity.name}", identity.pretrained_cfg
    if identity.library == "torchvision":
        from torchvision.models import get_model_weights

        return Remote(what, get_model_weights(identity.architecture)[identity.tag].url)
    if repository := config.get("hf_hub_id"):
        name = config.get("hf_hub_filename") or _DEFAULT_FILE
        safer = _SAFER_FILE.get(name, re.sub(r"\.bin$", ".safetensors", name))
        return Remote(what, repository, tuple(dict.fromkeys([safer, name])))
    if url := config.get("url"):
        return Remote(what, url)
    raise UsageError(
        f"timm has no pretrained weights for {identity.name}: give --weights, or "
        "--no-pretrained to train from scratch"
    )
