"""A few hundred of the damaged and hostile files that tools/fuzz.py reads for an hour."""

import json
import re
import warnings
from functools import reduce
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzz import LIMIT, Target, example, make_targets

NAMES = (
    *("image", "run", "head file", "exported model", "checkpoint"),
    *("weights .safetensors", "weights .pth", "local-dir", "config file", "class folders"),
    *("cached features", "cached pixels"),
)
_NOT_READ = (b"%!PS", b"\0\0\0\x0cjP", b"\0\0\1\0")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("seeds"))


def test_every_target_is_tried(targets: dict[str, Target]) -> None:
    assert targets.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_undamaged_files_are_read(targets: dict[str, Target], name: str, tmp_path: Path) -> None:
    """So that a refusal is of the damage."""
    target = targets[name]
    for files in target.seeds:
        if name != "image" or not _is_refused_on_purpose(files):
            whole = Target((files,), lambda random, files: files, target.reads)
            assert example(whole, Random(0), tmp_path / "example")


def _is_refused_on_purpose(files: dict[str, bytes]) -> bool:
    """PostScript, JPEG 2000, icons: Pillow would read them."""
    return any(content.startswith(_NOT_READ) for content in files.values())


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(
    targets: dict[str, Target], name: str, tmp_path: Path
) -> None:
    @settings(
        max_examples=40, derandomize=True, database=None, deadline=1000 * LIMIT,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def read(random: Random) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example(targets[name], random, tmp_path / "example")

    read()


@pytest.mark.parametrize(
    ("name", "where", "value", "read"),
    [
        # Seeds 3014690, 4023858 and 5007050 of "head file": what is false, as None is.
        ("head file", ("cnnft", "backbone", "weights_source"), "0", False),
        ("head file", ("cnnft", "backbone", "weights_source"), "false", False),
        ("head file", ("cnnft", "backbone", "weights_source"), "{}", False),
        # The first hour's: it could be built, but not run.
        ("exported model", ("model_args", "drop_rate"), "[0.5, 0.5, 0.5]", False),
        # Seeds 130054074 and 140008378: a name that no file can have, and one to fill a screen.
        ("head file", ("cnnft", "backbone", "weights_source"), json.dumps("x" * 300), False),
        ("head file", ("cnnft", "backbone", "weights_source"), json.dumps("x" * 100_000), False),
        # Seed 120002642 of "head file": whole numbers are numbers.
        ("head file", ("cnnft", "input_spec", "mean"), "[0, 0, 0]", True),
    ],
)
def test_what_fuzzing_found_is_refused_or_read(
    targets: dict[str, Target],
    tmp_path: Path,
    name: str,
    where: tuple[str, ...],
    value: str,
    read: bool,
) -> None:
    ((file, content),) = targets[name].seeds[0].items()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["cnnft"])
    reduce(dict.__getitem__, where[:-1], described)[where[-1]] = json.loads(value)
    header["__metadata__"]["cnnft"] = json.dumps(described)
    text = json.dumps(header).encode()
    damaged = {file: len(text).to_bytes(8, "little") + text + content[8 + length :]}
    hostile = Target((damaged,), lambda random, files: files, targets[name].reads)
    assert example(hostile, Random(0), tmp_path / "example") is read


@pytest.mark.parametrize("width", [2**59 + 32, 2**32 + 32, -1, 0])
def test_cached_pixels_whose_sizes_lie_are_not_read(
    targets: dict[str, Target], tmp_path: Path, width: int
) -> None:
    """Found by seed 1082499574798298 of "cached pixels": a product of sizes that wraps around."""
    target = targets["cached pixels"]
    files = dict(target.seeds[0])
    entry = next(name for name in files if name.endswith(".safetensors"))
    whole = (32).to_bytes(8, "little") * 2
    assert files[entry].count(whole) >= 1
    odd = width.to_bytes(8, "little", signed=True) + (32).to_bytes(8, "little")
    files[entry] = files[entry].replace(whole, odd, 1)
    hostile = Target((files,), lambda random, files: files, target.reads)
    assert not example(hostile, Random(0), tmp_path / "example")


def test_a_long_interval_is_not_repeated(targets: dict[str, Target], tmp_path: Path) -> None:
    """Found by seed 1487337063318619 of "config file"."""
    target = targets["config file"]
    ((name, content),) = target.seeds[0].items()
    line = b'checkpoint_every = "' + b"x" * 100_000 + b'"'
    changed = re.sub(rb"checkpoint_every = .*", line, content)
    assert line in changed
    hostile = Target(({name: changed},), lambda random, files: files, target.reads)
    assert not example(hostile, Random(0), tmp_path / "example")
