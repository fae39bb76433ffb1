"""Files that model hubs have: where the libraries keep them on this machine, and fetching them."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from cnnft.errors import first_line
from cnnft.machine import distributed
from cnnft.models.downloads import DownloadError, patiently

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """Which file it was, to the byte: names on a hub stay while the files behind them change."""

    sha256: str
    place: str | None = None
    """Where it was downloaded from, as in `Remote`; None: it was a file of this machine."""
    commit: str | None = None
    """Of the repository on the Hugging Face hub."""

    @classmethod
    def of(cls, path: str | Path, place: str | None = None, commit: str | None = None) -> "Pin":
        with Path(path).open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), place, commit)


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
        with distributed.main_rank_first():
            if found := self.cached():
                return found
            _log.info("fetching %s: kept on this machine from then on", self.what)
            try:
                return patiently(self._download)
            except Exception as error:  # the hub libraries raise many kinds, few documented
                raise DownloadError(
                    f"cannot download {self.what}: {first_line(error)}. Give a file that you have "
                    "with --weights FILE, or use --backbone builtin, which needs no network"
                ) from error

    def pin(self, path: Path) -> Pin:
        """Of the file that was fetched to `path`."""
        # The hub's own library keeps each commit in a folder that is named after it.
        snapshot = re.search(r"/snapshots/([^/]+)/", path.as_posix()) if self.names else None
        return Pin.of(path, self.place, snapshot[1] if snapshot else None)

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
