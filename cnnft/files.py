"""Files that are whole: they appear at once, or not at all."""

import os
import tempfile
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from cnnft.errors import CnnftError

_UNFINISHED = ".unfinished"


def to_safetensors(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return bytes(save({k: v.detach().cpu().contiguous() for k, v in state.items()}, metadata))


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename: a crash leaves the old file or the new one, whole.

    Raises:
        CnnftError: the disk is full, or the place cannot be written to.
    """
    temporary: str | None = None
    try:
        if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CnnftError(f"{path} cannot be written ({error.strerror})") from error


def remove_unfinished(folder: Path) -> None:
    """What `write_whole` left in `folder` when its process was killed, while nobody writes now."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
