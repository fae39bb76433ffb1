"""Download a file: give up when nothing arrives any more, and never on a slow server.

The libraries' own downloads cannot promise that. torch.hub waits for ever; huggingface_hub retries
for a minute, and its files grow in steps of 10 MB, so that a slow one looks like a dead one; hf_xet
has its own limits. A timeout of this one connection counts from the last byte received.
"""

import hashlib
import http.client
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

from cnnft import __version__
from cnnft.errors import CnnftError, first_line
from cnnft.machine.files import writing_whole

PATIENCE = 15.0
"""Seconds without a byte after which a download has failed."""

_CHUNK = 2**20


class DownloadError(CnnftError):
    """The server cannot be reached, stopped answering, or sent something else."""


def download(
    url: str,
    path: Path,
    *,
    headers: Mapping[str, str] | None = None,
    sha256: str = "",
    patience: float = PATIENCE,
) -> None:
    """The file at `url` becomes `path`, whole or not at all; its SHA-256 begins with `sha256`.

    Raises:
        DownloadError: no byte for `patience` seconds, too few bytes, or another SHA-256.
        OSError: the server cannot be reached, or has no such file.
    """
    digest = hashlib.sha256()
    request = Request(url, headers={"User-Agent": f"cnnft/{__version__}", **(headers or {})})
    try:
        response = urlopen(request, timeout=patience, context=_certificates())
    except TimeoutError as error:  # after the connection
        raise DownloadError(_silence(patience)) from error
    with response, writing_whole(path) as file:
        for chunk in _chunks(response, patience):
            digest.update(chunk)
            file.write(chunk)
        if not digest.hexdigest().startswith(sha256):
            raise DownloadError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")


def _chunks(response: http.client.HTTPResponse, patience: float) -> Iterator[bytes]:
    expected, received = response.length, 0
    try:
        while chunk := response.read1(_CHUNK):
            received += len(chunk)
            yield chunk
    except TimeoutError as error:
        raise DownloadError(_silence(patience)) from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"the connection broke ({first_line(error)})") from error
    if expected is not None and received < expected:
        raise DownloadError(f"the connection ended after {received} of {expected} bytes")


def _silence(patience: float) -> str:
    return f"nothing was received for {patience:.0f} seconds"


def _certificates() -> ssl.SSLContext:
    """The system's; and certifi's, where it is, for Pythons that do not find the system's."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context
