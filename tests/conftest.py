"""Small generated images, a small network, the real entry point."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnft.cli import main

# Networks this small lose more by threads that wait for each other than they gain; torch reads
# this when a test first imports it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def fails_with(self, code: int, *parts: str) -> None:
        """Asserts the exit code, no result, and one `error:` line with all `parts` at the end."""
        __tracebackhide__ = True
        assert self.code == code, (self.code, self.err)
        assert self.out == ""
        lines = self.err.splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        assert "Traceback" not in self.err and "this is a bug" not in self.err
        for part in parts:
            assert part in lines[-1]


def assert_alike(found: object, expected: object, tolerance: float = 1e-6) -> None:
    """Of JSON documents: the same but for rounding of numbers, as where a temperature is in the
    weights.
    """
    __tracebackhide__ = True
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, tolerance)
    elif isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        for name in expected:
            assert_alike(found[name], expected[name], tolerance)
    else:
        assert found == expected


@pytest.fixture(autouse=True, scope="session")
def shared_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what fixtures of the session train: not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNFT_CACHE", str(tmp_path_factory.mktemp("shared-cache")))
        yield


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, for this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CNNFT_CACHE", str(folder))
    return folder


@pytest.fixture
def cnnft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process: cnnft("finetune", folder, "--epochs", 1)."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = exit.value.code
        return Outcome(code if isinstance(code, int) else int(bool(code)), *captured)

    return run


def draw(path: Path, label: int, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    """A striped image whose direction and tint tell the label; the rest is noise."""
    random = np.random.default_rng([label, seed])
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    stripes = np.sin((x if label % 2 else y) * 0.7 + random.uniform(0, 6))
    pixels = random.normal(128, 20, (size[1], size[0], 3)) + 60 * stripes[..., None]
    pixels[..., label % 3] += 40
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def draw_folder(folder: Path, classes: tuple[str, ...], images: int, first_seed: int = 0) -> Path:
    """folder/<class>/<n>.png"""
    for label, name in enumerate(classes):
        for n in range(images):
            draw(folder / name / f"{n}.png", label, first_seed + n)
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """DATA/<class>/*: 2 classes of 10 images."""
    return draw_folder(tmp_path / "flat", ("ants", "bees"), 10)


@pytest.fixture
def separated(tmp_path: Path) -> Path:
    """DATA/train and DATA/val: 3 classes of 6 and 3 images."""
    data = tmp_path / "separated"
    draw_folder(data / "train", ("ants", "bees", "wasps"), 6)
    draw_folder(data / "val", ("ants", "bees", "wasps"), 3, first_seed=100)
    return data


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature-extractor run on ants and bees, built-in backbone; its data beside it."""
    from cnnft import finetune

    folder = tmp_path_factory.mktemp("trained")
    data = draw_folder(folder / "data", ("ants", "bees"), 10)
    return finetune(
        data, backbone="builtin", mode="feature-extractor", epochs=2, workers=0,
        runs_dir=folder / "runs", name="frozen", head_lr=0.5,
    ).path  # fmt: skip


@pytest.fixture(scope="session")
def finetuned(trained: Path) -> Path:
    """A finetune run on the same data."""
    from cnnft import finetune

    return finetune(
        trained.parents[1] / "data", backbone="builtin", epochs=1, workers=0,
        probe_first=False, runs_dir=trained.parent, name="finetuned",
    ).path  # fmt: skip
