"""Where the libraries keep pretrained weights on this machine, and fetching what is not there."""

import logging
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from cnnft.downloads import DownloadError, patiently
from cnnft.errors import UsageError
from cnnft.zoo import Identity

_log = logging.getLogger(__name__)

_DEFAULT_NAME = "pytorch_model.bin"
_SAFER = {
    _DEFAULT_NAME: "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
"""timm prefers the safetensors file that lies beside one of these."""


def weights_file(identity: Identity) -> Path:
    """The library's weights of a named backbone: from this machine, or downloaded to stay there.

    Raises:
        UsageError: the library has none.
        DownloadError: they are not here and cannot be fetched.
    """
    if found := cached_file(identity):
        return found
    _log.info("fetching the weights of %s: kept on this machine from then on", identity.name)
    try:
        return patiently(lambda: _download(identity))
    except Exception as error:  # the hub libraries raise many kinds, few of them documented
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        raise DownloadError(
            f"cannot download the weights of {identity.name}: {reason}. Give a file that you have "
            "with --weights FILE, or use --backbone builtin, which needs no network"
        ) from error


def cached_file(identity: Identity) -> Path | None:
    """The weights' file in the libraries' own caches, if it is there; asks no network.

    Raises:
        UsageError: the library has no weights for this backbone.
    """
    if url := _url(identity):
        path = _place_of(url)
        return path if path.is_file() else None
    repository, revision, names = _hub_files(identity)
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _download(identity: Identity) -> Path:
    if url := _url(identity):
        path = _place_of(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = re.search(r"-([a-f0-9]{8,})\.", path.name)  # torch.hub's convention: SHA-256
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=stated.group(1) if stated else None, progress=False
        )
        return path
    repository, revision, names = _hub_files(identity)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError:  # no network; a kind of EntryNotFoundError
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repository} has none of {', '.join(names)}")


def _url(identity: Identity) -> str | None:
    """Where a single file lies; None for a repository on the Hugging Face hub."""
    if identity.library == "torchvision":
        from torchvision.models import get_model_weights

        url: str = get_model_weights(identity.architecture)[identity.tag].url
        return url
    if identity.pretrained_cfg.get("hf_hub_id"):
        return None
    elsewhere: str | None = identity.pretrained_cfg.get("url")
    if elsewhere:
        return elsewhere
    raise UsageError(
        f"timm has no pretrained weights for {identity.name}: give --weights, or "
        "--no-pretrained to train from scratch"
    )


def _place_of(url: str) -> Path:
    """Where torch.hub, and with it torchvision and timm, keeps the file of this URL."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def _hub_files(identity: Identity) -> tuple[str, str | None, list[str]]:
    """(repository, revision, file names in the order of timm's preference)."""
    repository, _, revision = identity.pretrained_cfg["hf_hub_id"].partition("@")
    name = identity.pretrained_cfg.get("hf_hub_filename") or _DEFAULT_NAME
    safer = _SAFER.get(name, re.sub(r"\.bin$", ".safetensors", name))
    return repository, revision or None, list(dict.fromkeys([safer, name]))
