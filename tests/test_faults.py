"""A few of the kills and faults of tools/faults.py, which tries many."""

import random
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("forks, and reads /proc", allow_module_level=True)

from tools.faults import MATRIX, bytes_lost, draw_data, kill_and_resume, other_faults


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if i == 0 else pytest.mark.slow) for i, name in enumerate(MATRIX)],
)
def test_killed_at_random_instants_and_resumed(tmp_path: Path, name: str) -> None:
    data = draw_data(tmp_path / "data")
    killed = kill_and_resume(data, tmp_path / "kills", MATRIX[name], 3, random.Random(0))
    assert killed.phases.total() == 3 and killed.bytes_lost == 0


@pytest.mark.slow
def test_other_faults_lose_nothing(tmp_path: Path) -> None:
    data = draw_data(tmp_path / "data")
    for fault in other_faults(data, tmp_path / "faults", 1, random.Random(0)):
        assert fault.survived == fault.tries and fault.bytes_lost == 0, fault


def test_a_difference_is_counted() -> None:
    assert bytes_lost({"a": b"12", "b": b"1"}, {"a": b"13"}) == 2
