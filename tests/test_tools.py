"""Programs beside the package follow it: each can be imported, and says what it is for."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("tools", "benchmarks", "research")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_find_what_they_use(name: str) -> None:
    if name == "research.pretrain.probe_table":
        pytest.importorskip("skimage", reason="cnnft[research] is not installed")
    assert import_module(name).__doc__
