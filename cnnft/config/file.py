"""A file of settings, such as a run's config.toml."""

import tomllib
from pathlib import Path
from typing import Any

from cnnft.errors import CnnftError, UsageError, first_line


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file; `Config.from_dict` checks them."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CnnftError(f"{path} is not valid TOML ({first_line(error)})") from error
