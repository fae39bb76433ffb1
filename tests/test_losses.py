"""The losses of short trainings are those of the files in tests/losses/, on any CPU."""

import json
from pathlib import Path

import pytest
from pinned import CONFIGURATIONS, MODES, file_of, make_material, run_losses


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pinned")
    make_material(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_losses_are_those_of_the_file(material: Path, name: str, mode: str):
    expected = json.loads(file_of(name, mode).read_text())
    found = run_losses(material, CONFIGURATIONS[name], mode)
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        assert found[kind] == pytest.approx(values, rel=1e-9, abs=1e-9), kind
