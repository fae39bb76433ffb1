"""Pretrained weights: from a file or a hub into a network, and the hash that tells them apart."""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.machine.files import kind_of_file
from cnnft.models.heads import without_head
from cnnft.models.hub import Pin
from cnnft.models.identity import Identity
from cnnft.models.registry import local_folder, remote_weights

_POSITIONS = ("pos_embed", "pos_embedding")

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which checkpoints keep their weights; averaged ones are meant to be used."""

MIN_MATCH = 0.9
"""A weights file that fits fewer of the backbone's tensors belongs to another architecture."""


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a set of pretrained weights."""

    source: str
    pin: Pin
    matched: int
    """Backbone tensors that were filled."""
    missing: tuple[str, ...]
    """Backbone tensors that the weights do not have."""
    unused: tuple[str, ...]
    """Tensors of the weights that the backbone does not have, their old head included."""


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
    of_library = weights is None and (identity.name == "builtin" or not local_folder(identity.name))
    if weights is None and (folder := local_folder(identity.name)):
        weights = folder / "model.safetensors"
    if weights is not None:
        state, pin = read_weights(weights), Pin.of(weights)
    else:
        state, pin = _library_weights(identity)
    source = identity.name if of_library else str(weights)
    wanted = without_head(network.state_dict(), head)
    state = _without_prefix(state, wanted)
    state = {name: _at_shape(name, tensor, wanted) for name, tensor in state.items()}
    fitting = {n: t for n, t in state.items() if n in wanted and t.shape == wanted[n].shape}
    # A counter that BatchNorm does not need: files converted from other frameworks lack it.
    counted = {name for name in wanted if not name.endswith("num_batches_tracked")}
    matched = len(counted & fitting.keys())
    if matched < MIN_MATCH * len(counted):
        raise CnnftError(
            f"{source} does not hold weights of {identity.architecture}: {matched} of the "
            f"backbone's {len(counted)} tensors match; give the --backbone that it was made with"
        )
    try:
        network.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # a type of number that torch does not convert
        raise CnnftError(f"{source} cannot be loaded ({first_line(error)})") from error
    return LoadedWeights(
        source=source,
        pin=pin,
        matched=matched,
        missing=tuple(sorted(counted - fitting.keys())),
        unused=tuple(sorted(state.keys() - fitting.keys())),
    )


def _at_shape(name: str, tensor: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    """A position embedding (1, class token + grid², D) for another size of image is resampled."""
    place = wanted.get(name)
    if place is None or place.shape == tensor.shape or not name.endswith(_POSITIONS):
        return tensor
    if tensor.ndim != 3 or place.ndim != 3 or place.shape[::2] != tensor.shape[::2]:
        return tensor
    grid = math.isqrt(place.shape[1])
    prefix = place.shape[1] - grid**2
    theirs = tensor.shape[1] - prefix
    if theirs < 1 or math.isqrt(theirs) ** 2 != theirs:
        return tensor  # it is not of such a network: it will be missing
    return resample_abs_pos_embed(tensor, [grid, grid], num_prefix_tokens=prefix)


def _library_weights(identity: Identity) -> tuple[dict[str, Tensor], Pin]:
    """The library's weights under the library's names."""
    remote = remote_weights(identity)
    file = remote.fetch()
    pin = remote.pin(file)
    if identity.library == "torchvision":
        return read_weights(file), pin
    # timm converts what other projects published as it loads it, which takes a whole network.
    config = identity.pretrained_cfg | {"source": "", "file": str(file)}
    try:
        network = timm.create_model(
            identity.architecture,
            pretrained=True,
            pretrained_cfg=config,
            num_classes=config["num_classes"],
            **identity.model_args,
        )
    except Exception as error:  # whatever timm says of a file, or of a description from a hub
        raise CnnftError(
            f"{file} does not hold weights of {identity.name} ({first_line(error)})"
        ) from error
    state: dict[str, Tensor] = network.state_dict()
    return state, pin


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pth or .pt file without running its code."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the weights file in it")
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            _refuse_packed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle, safetensors and torch each have their own
        kind = kind_of_file(path)
        damaged = kind is None or ("PyTorch" in kind and path.suffix != ".safetensors")
        reason = first_line(error) if damaged else f"it is {kind}"
        raise CnnftError(
            f"{path} cannot be read as weights ({reason}): it must be a .safetensors file, or a "
            ".pth file that holds tensors only"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise CnnftError(f"{path} holds no state dict (names and tensors)")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise CnnftError(f"{path} holds a tensor {name[:100]!r} that is no plain array")
    return tensors


def _refuse_packed(path: Path) -> None:
    """Torch packs nothing: an archive that unpacks to more than it is would fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file")


def _is_plain(tensor: Tensor) -> bool:
    """Numbers that are all there: a view of one number may claim to be terabytes."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _without_prefix(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The names under which most tensors are wanted: training wraps networks in prefixes."""
    wanted = set(wanted)
    first = {name.partition(".")[0] + "." for name in state}
    nested = {prefix + name.split(".")[1] + "." for prefix in first for name in state
              if name.startswith(prefix) and name.count(".") > 1}  # fmt: skip
    candidates = [
        {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        for prefix in ("", *sorted(first), *sorted(nested))
    ]
    return max(candidates, key=lambda names: len(names.keys() & wanted))


def backbone_hash(network: nn.Module, head: frozenset[str]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and bytes of all tensors but the head's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(without_head(network.state_dict(), head).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
