"""Files that model hubs have: where the libraries keep them on this machine, and fetching them."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from cnnft.downloads import DownloadError, patiently
from cnnft.errors import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file on a hub, or in the cache that the hub's own library keeps."""

    what: str
    """For messages: "the weights of resnet18"."""
    place: str
    """A URL, or a repository on the Hugging Face hub, owner/name or owner/name@revision."""
    names: tuple[str, ...] = ()
    """Of the file in the repository, the one preferred first; none for a URL."""

    def cached(self) -> Path | None:
        """The file, if it is on this machine; asks no network."""
        if not self.names:
            path = self._kept()
            return path if path.is_file() else None
        repository, _, revision = self.place.partition("@")
        for name in self.names:
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return None

    def fetch(self) -> Path:
        """The file from this machine, or downloaded to stay there.

        Raises:
            DownloadError: it is not here and cannot be fetched.
        """
        if found := self.cached():
            return found
        _log.info("fetching %s: kept on this machine from then on", self.what)
        try:
            return patiently(self._download)
        except Exception as error:  # the hub libraries raise many kinds, few of them documented
            raise DownloadError(
                f"cannot download {self.what}: {first_line(error)}. Give a file that you have with "
                "--weights FILE, or use --backbone builtin, which needs no network"
            ) from error

    def _download(self) -> Path:
        if not self.names:
            path = self._kept()
            path.parent.mkdir(parents=True, exist_ok=True)
            stated = re.search(r"-([a-f0-9]{8,})\.", path.name)  # torch.hub's convention: SHA-256
            prefix = stated.group(1) if stated else None
            torch.hub.download_url_to_file(self.place, str(path), prefix, progress=False)
            return path
        repository, _, revision = self.place.partition("@")
        for name in self.names:
            try:
                return Path(hf_hub_download(repository, name, revision=revision or None))
            except LocalEntryNotFoundError:  # no network; a kind of EntryNotFoundError
                raise
            except EntryNotFoundError:
                continue
        raise FileNotFoundError(f"{repository} has no {' or '.join(self.names)}")

    def _kept(self) -> Path:
        """Where torch.hub, and with it torchvision and timm, keeps the file of this URL."""
        return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(self.place).path).name)
