"""Files of model hubs: where the hub libraries cache them on this machine, and downloading them.

`cnnft backbones` looks for thousands of files: what takes long to import is imported when used.
"""

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from huggingface_hub import constants

from cnnft.errors import first_line
from cnnft.machine import distributed
from cnnft.machine.files import write_whole
from cnnft.models import downloads
from cnnft.models.downloads import DownloadError, download

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
            path = _torch_hub_file(self.place)
            return path if path.is_file() else None
        repository, _, revision = self.place.partition("@")
        if not _hub_folder(repository).is_dir():
            return None
        from huggingface_hub import try_to_load_from_cache

        for name in self.names:
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return None

    def fetch(self) -> Path:
        """The file from this machine, or downloaded into the hub's cache.

        Raises:
            DownloadError: it is not here and cannot be downloaded.
        """
        with distributed.main_rank_first():
            if found := self.cached():
                return found
            _log.info("downloading %s: cached on this machine from then on", self.what)
            try:
                return self._download()
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
            path = _torch_hub_file(self.place)
            stated = re.search(r"-([a-f0-9]{8,})\.", path.name)  # torch.hub's convention
            sha256 = stated[1] if stated else ""
            download(self.place, path, sha256=sha256, patience=downloads.PATIENCE)
            return path
        from huggingface_hub.errors import EntryNotFoundError

        repository, _, revision = self.place.partition("@")
        for name in self.names:
            try:
                return _download_from_hub(repository, name, revision or "main")
            except EntryNotFoundError:
                continue
        raise FileNotFoundError(f"{repository} has no {' or '.join(self.names)}")


def _torch_hub_file(url: str) -> Path:
    """Where torch.hub, and with it torchvision and timm, caches the file of this URL."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or Path(cache, "torch")
    return Path(home, "hub", "checkpoints", Path(urlparse(url).path).name).expanduser()


def _hub_folder(repository: str) -> Path:
    """Where huggingface_hub caches the files of a repository."""
    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")


def _download_from_hub(repository: str, name: str, revision: str) -> Path:
    """Into huggingface_hub's cache, as it does itself where there are no symbolic links."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repository, name, revision=revision)
    found = get_hf_file_metadata(url, timeout=downloads.PATIENCE)
    commit = found.commit_hash or ""
    if not re.fullmatch(r"[a-f0-9]{40}", commit):
        raise DownloadError(f"{url} is no file of a Hugging Face hub")
    # The storage that it may redirect to gets no token.
    own = urlparse(found.location).netloc == urlparse(url).netloc
    sha256 = found.etag if found.etag and re.fullmatch(r"[a-f0-9]{64}", found.etag) else ""
    folder = _hub_folder(repository)
    path = folder / "snapshots" / commit / name
    download(
        found.location,
        path,
        headers=build_hf_headers() if own else {},
        sha256=sha256,  # of large files; of small ones the ETag is Git's hash
        patience=downloads.PATIENCE,
    )
    if revision != commit:
        write_whole(folder / "refs" / revision, commit.encode())
    return path
