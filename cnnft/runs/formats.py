"""The version of each file of a run, kept in its formats.json.

A version is raised where an older cnnft could not read the file; what is only added needs none,
because unknown keys and columns are ignored. config.json has its version within, as exported files
do, and vouches for the weights too.
"""

from typing import IO, Any

from cnnft import __version__
from cnnft.machine.files import parse_json, to_json
from cnnft.runs.directory import CONFIG, STATE

FORMATS = {
    CONFIG: 1,
    "history.csv": 2,  # 1: its train_loss was the objective, smoothing and weights included
    "metrics.jsonl": 2,
    "metrics.json": 1,
    "penalties.csv": 1,
    "comparison.json": 1,
    "predictions.csv": 1,
    "environment.json": 1,
    "data.csv": 2,  # 1: no group and weight
    "skipped.csv": 1,
    "run.log": 1,
    STATE: 3,  # 1: samples in the order of their names; 2: no epoch 0, running BatchNorm statistics
}


def formats_to_json() -> bytes:
    return to_json({"cnnft": __version__, "formats": FORMATS})


def formats_from_json(file: IO[bytes]) -> tuple[str, dict[str, int]]:
    """(the cnnft that wrote the run, the version of each of its files)."""
    values: dict[str, Any] = parse_json(file.read(), file.name)
    version, formats = values["cnnft"], values["formats"]
    if not isinstance(version, str) or not all(isinstance(n, int) for n in formats.values()):
        raise ValueError("it holds no versions")
    return version[:20], formats
