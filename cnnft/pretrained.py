"""Pretrained weights: from a file or a hub into a network, and the hash that tells them apart."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cnnft.errors import CnnftError, UsageError
from cnnft.heads import without_head
from cnnft.zoo import Identity, local_folder, remote_weights

MIN_MATCH = 0.9
"""A weights file that fits fewer of the backbone's tensors belongs to another architecture."""


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
    if weights is None and (folder := local_folder(identity.name)):
        weights = folder / "model.safetensors"
    state = read_weights(weights) if weights is not None else _library_weights(identity)
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


def _library_weights(identity: Identity) -> dict[str, Tensor]:
    """The library's weights under the library's names."""
    file = remote_weights(identity).fetch()
    if identity.library == "torchvision":
        return read_weights(file)
    # timm converts what other projects published as it loads it, which takes a whole network.
    config = identity.pretrained_cfg | {"source": "", "file": str(file)}
    network = timm.create_model(
        identity.architecture,
        pretrained=True,
        pretrained_cfg=config,
        num_classes=config["num_classes"],
        **identity.model_args,
    )
    state: dict[str, Tensor] = network.state_dict()
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
