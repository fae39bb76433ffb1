"""Names in timm and torchvision -> `Identity`."""

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm

from cnnft.errors import CnnftError, UsageError, did_you_mean, first_line
from cnnft.machine.files import parse_json
from cnnft.models.hub import Remote
from cnnft.models.identity import Identity, input_spec, torchvision_names

_TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    # The weights were trained on TensorFlow's normalisation, which transform_input restores.
    name: {"transform_input": True, "aux_logits": False, "init_weights": True}
    for name in ("googlenet", "inception_v3")
}

ONE_SIZE = "vit_"
"""torchvision's networks that are built for one size of image."""


def resolve(name: str, *, own_weights: bool = False) -> Identity:
    """Find `name` in its library, without building or downloading anything.

    With weights of the user's own, timm need not know their tag: they expect the input that its
    own default weights do.
    """
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
    if own_weights and name not in tags:
        name, tag = architecture, ""
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
    return [*timm.list_models(), *(f"torchvision/{name}" for name in torchvision_names())]


def local_folder(name: str) -> Path | None:
    if name == "builtin":
        return Path(str(files("cnnft") / "models" / "builtin"))
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    return None


def _from_folder(name: str, folder: Path) -> Identity:
    config_file = folder / "config.json"
    if folder.is_file():
        raise UsageError(f"{folder} is a file: local-dir: takes a folder in timm's layout")
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
    if architecture not in torchvision_names():
        known = [f"torchvision/{other}" for other in torchvision_names()]
        raise UsageError(f"unknown backbone {name!r}{did_you_mean(name, known)}")
    options = get_model_weights(architecture)
    if tag and tag not in options.__members__:
        choices = ", ".join(options.__members__)
        raise UsageError(f"torchvision/{architecture} has no weights {tag!r}: choose {choices}")
    tag = options[tag or "DEFAULT"].name
    full = f"torchvision/{architecture}@{tag}"
    model_args = _TORCHVISION_ARGS.get(architecture, {})
    if architecture.startswith(ONE_SIZE):
        model_args = {"image_size": options[tag].transforms().crop_size[0]}
    return Identity(full, "torchvision", architecture, tag, model_args)


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
