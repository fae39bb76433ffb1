"""A name -> a backbone: the network, its pretrained weights and its `InputSpec`."""

import difflib
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from cnnft.downloads import DownloadError, patiently
from cnnft.errors import CnnftError, UsageError
from cnnft.heads import head_tensors, without_head
from cnnft.transforms import Fit, InputSpec

_log = logging.getLogger(__name__)

MIN_MATCH = 0.9
"""A weights file that fits fewer of the backbone's tensors belongs to another architecture."""

_FIT_OF_CROP_MODE: dict[str, Fit] = {
    "center": "crop",
    "squash": "squash",
    "border": "pad",
}  # timm's words


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a set of pretrained weights."""

    source: str
    matched: int
    """Backbone tensors that were filled."""
    missing: tuple[str, ...]
    """Backbone tensors that the weights do not have."""
    unused: tuple[str, ...]
    """Tensors of the weights that the backbone does not have, their old head included."""


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
        identity = _described_beside(Path(weights), identity)
    network = build(identity, classes)
    head = head_tensors(network, lambda other: build(identity, other))
    backbone = Backbone(network, head, input_spec(identity), identity, None)
    if pretrained:
        backbone.weights = load_weights(network, head, identity, weights)
    return backbone


# ---------------------------------------------------------------- names


def resolve(name: str) -> Identity:
    """Find `name` in its library, without building or downloading anything."""
    if folder := _local_folder(name):
        return _from_folder(name, folder)
    if name.startswith("torchvision/"):
        return _from_torchvision(name)
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        known = timm.list_models() + [f"torchvision/{other}" for other in _torchvision_names()]
        raise UsageError(f"unknown backbone {name!r}{_near(name, [*known, 'builtin'])}")
    architecture, _, tag = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*") + timm.list_pretrained(architecture)
    if tag and name not in tags:
        raise UsageError(f"backbone {architecture} has no weights {tag!r}{_near(name, tags)}")
    config = timm.get_pretrained_cfg(name)
    tag = (config.tag if config else "") or ""
    return Identity(
        name=f"{architecture}.{tag}" if tag else architecture,
        library="timm",
        architecture=architecture,
        tag=tag,
        pretrained_cfg=config.to_dict() if config else {},
    )


def _local_folder(name: str) -> Path | None:
    if name == "builtin":
        return Path(str(files("cnnft") / "weights" / "builtin"))
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    return None


def _from_folder(name: str, folder: Path) -> Identity:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{config_file}: no such file; local-dir: takes a folder in timm's layout")
    try:
        description = json.loads(config_file.read_text(encoding="utf-8"))
        architecture, config = description["architecture"], dict(description["pretrained_cfg"])
        model_args = dict(description.get("model_args") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise CnnftError(f"{config_file} is not a timm model description ({error!r})") from error
    if not timm.is_model(architecture):
        raise CnnftError(f"{config_file} describes {architecture!r}, which this timm does not know")
    return Identity(name, "timm", architecture, config.get("tag", ""), model_args, config)


def _described_beside(weights: Path, identity: Identity) -> Identity:
    """The identity in the config.json next to a weights file, if it is of the same architecture.

    It may say what the tensors cannot, such as TensorFlow's padding and normalisation: ignoring it
    costs accuracy without any error.
    """
    if not (weights.parent / "config.json").is_file():
        return identity
    found = _from_folder(identity.name, weights.parent)
    return found if found.architecture == identity.architecture else identity


def _from_torchvision(name: str) -> Identity:
    from torchvision.models import get_model_weights

    architecture, _, tag = name.removeprefix("torchvision/").partition("@")
    if architecture not in _torchvision_names():
        known = [f"torchvision/{other}" for other in _torchvision_names()]
        raise UsageError(f"unknown backbone {name!r}{_near(name, known)}")
    options = get_model_weights(architecture)
    if tag and tag not in options.__members__:
        choices = ", ".join(options.__members__)
        raise UsageError(f"torchvision/{architecture} has no weights {tag!r}: choose {choices}")
    tag = options[tag or "DEFAULT"].name
    return Identity(f"torchvision/{architecture}@{tag}", "torchvision", architecture, tag)


def _torchvision_names() -> list[str]:
    import torchvision.models

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


# ---------------------------------------------------------------- networks


def build(identity: Identity, classes: int) -> nn.Module:
    """The network with random weights and a head for `classes` classes."""
    network: nn.Module
    if identity.library == "torchvision":
        from torchvision.models import get_model

        network = get_model(
            identity.architecture, weights=None, num_classes=classes, **identity.model_args
        )
    else:
        network = timm.create_model(
            identity.architecture,
            pretrained_cfg=identity.pretrained_cfg or None,
            num_classes=classes,
            **identity.model_args,
        )
    return network


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
    config = timm.data.resolve_data_config(pretrained_cfg=identity.pretrained_cfg or {"": None})
    channels, height, width = config["input_size"]
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
        fit=_FIT_OF_CROP_MODE[config["crop_mode"]],
    )


# ---------------------------------------------------------------- weights


def load_weights(
    network: nn.Module,
    head: frozenset[str],
    identity: Identity,
    weights: str | Path | None = None,
) -> LoadedWeights:
    """Fill the backbone from the file `weights` or with the library's own; the head stays fresh.

    Raises:
        UsageError: a missing file, or no weights exist for this backbone.
        CnnftError: a download that fails, a file that cannot be read or is of another network.
    """
    if weights is None and (folder := _local_folder(identity.name)):
        weights = folder / "model.safetensors"
    state = read_weights(weights) if weights is not None else _download(identity)
    source = identity.name if weights is None or identity.name == "builtin" else str(weights)
    wanted = without_head(network.state_dict(), head)
    fitting = {n: t for n, t in state.items() if n in wanted and t.shape == wanted[n].shape}
    # A counter that BatchNorm does not need: files converted from other frameworks lack it.
    counted = {name for name in wanted if not name.endswith("num_batches_tracked")}
    matched = len(counted & fitting.keys())
    if matched < MIN_MATCH * len(counted):
        raise CnnftError(
            f"{source} does not hold weights of {identity.architecture}: {matched} of the "
            f"backbone's {len(counted)} tensors match; give the --backbone that it was made with"
        )
    network.load_state_dict(fitting, strict=False)
    return LoadedWeights(
        source=source,
        matched=matched,
        missing=tuple(sorted(counted - fitting.keys())),
        unused=tuple(sorted(state.keys() - fitting.keys())),
    )


def _download(identity: Identity) -> dict[str, Tensor]:
    """The library's weights under the library's names, from its cache or its hub."""
    _log.info("fetching the weights of %s: kept on this machine from then on", identity.name)
    fetch = _torchvision_state if identity.library == "torchvision" else _timm_state
    try:
        return patiently(lambda: fetch(identity))
    except UsageError:
        raise
    except Exception as error:  # the hub libraries raise many kinds, few of them documented
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise DownloadError(
            f"cannot download the weights of {identity.name}: {reason}. Give a file that you have "
            "with --weights FILE, or use --backbone builtin, which needs no network"
        ) from error


def _timm_state(identity: Identity) -> dict[str, Tensor]:
    if not timm.models.is_model_pretrained(identity.name):
        raise UsageError(
            f"timm has no pretrained weights for {identity.name}: give --weights, or "
            "--no-pretrained to train from scratch"
        )
    state: dict[str, Tensor] = timm.create_model(identity.name, pretrained=True).state_dict()
    return state


def _torchvision_state(identity: Identity) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(identity.architecture)[identity.tag]
    state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pth or .pt file without running its code."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, safetensors and torch each have their own
        reason = str(error).strip().split("\n")[0]
        raise CnnftError(
            f"{path} cannot be read as weights ({reason}): it must be a safetensors file, or a "
            ".pth file that holds tensors only"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise CnnftError(f"{path} holds no state dict (names and tensors)")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def backbone_hash(network: nn.Module, head: frozenset[str]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and bytes of all tensors but the head's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(without_head(network.state_dict(), head).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
