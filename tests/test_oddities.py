"""A folder of everything that is found in the wild, through the real entry point."""

import csv
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Outcome, draw_folder
from oddities import BAD, GOOD, IGNORED, encoded, picture
from PIL import Image

from cnnft import load
from cnnft.data import images

Cli = Callable[..., Outcome]


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def wild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[Path], dict[Path, str]]:
    """(the images, the others with a part of their reason); all in tmp_path / "photos"."""
    monkeypatch.setattr(images, "opens_heic", lambda: False)
    data = draw_folder(tmp_path / "photos", ("ants", "bees"), 3)
    good = set(data.glob("*/*.png"))
    for seed, (name, make) in enumerate(GOOD.items()):
        good.add(put(data / ("ants", "bees")[seed % 2] / name, make(picture(seed))))
    for seed, size in enumerate([(1, 20_000), (20_000, 1), (1, 1)], start=100):
        good.add(put(data / "ants" / f"{size}.png", encoded(picture(seed, size), "PNG")))
    bad = {put(data / "bees" / name, content): why for name, (content, why) in BAD.items()}
    for name in IGNORED:
        put(data / "ants" / name, encoded(picture(), "PNG"))

    if os.name == "posix":
        ants, elsewhere = data / "ants", tmp_path / "elsewhere"
        put(elsewhere / "linked.png", encoded(picture(200), "PNG"))
        (ants / "link").symlink_to(elsewhere)
        (ants / "link.png").symlink_to(put(tmp_path / "x", encoded(picture(201), "PNG")))
        good |= {ants / "link" / "linked.png", ants / "link.png"}
        (ants / "loop").symlink_to(ants)
        (ants / "up").symlink_to(data)
        (data / "round").symlink_to("round")
        for name, target in (("gone.png", "nowhere.png"), ("circle.png", "circle.png")):
            (ants / name).symlink_to(target)
            bad[ants / name] = "cannot be read"
        os.mkfifo(ants / "pipe.png")
        bad[ants / "pipe.png"] = "is not a regular file"
    with suppress(OSError):  # a file system of Unicode names has no such file
        good.add(put(data / "bees" / os.fsdecode(b"caf\xe9.png"), encoded(picture(300), "PNG")))
    return good, bad


def beside(data: Path) -> set[Path]:
    """What is left out of `wild` for its name or its place."""
    ants = data / "ants"
    found = {ants / "*", ants / "__MACOSX", ants / ".cache", ants / "@eaDir"}
    if os.name == "posix":
        found |= {ants / "loop", ants / "up", data / "round"}
    return found


def test_a_folder_of_oddities_trains_and_every_prediction_belongs_to_its_file(
    cnnft: Cli, tmp_path: Path, wild: tuple[set[Path], dict[Path, str]]
) -> None:
    (good, bad), data, run = wild, tmp_path / "photos", tmp_path / "runs" / "run"
    settings = ["--backbone=builtin", "--mode=feature-extractor", "--epochs=1", "--workers=0"]
    place = ["--runs-dir", run.parent, "--name", run.name]
    outcome = cnnft("finetune", data, *settings, *place)
    assert outcome.code == 0, outcome.err

    def rows(name: str) -> list[dict[str, str]]:
        text = (run / name).open(encoding="utf-8", errors="surrogateescape", newline="")
        with text as file:
            return list(csv.DictReader(file))

    assert sorted(row["file"] for row in rows("data.csv")) == sorted(map(str, good))
    skipped = {Path(row["file"]): row["reason"] for row in rows("skipped.csv")}
    assert (
        skipped.keys()
        == bad.keys() | beside(data)
        == {Path(r["file"]) for r in rows("skipped.csv")}
    )
    assert [path for path, part in bad.items() if part not in skipped[path]] == []
    lines = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    tried = {path for path, part in bad.items() if "suffix" not in part}
    named = {path for path in tried if path.suffix}
    assert len(tried - named) == 1  # a file without a suffix is no image that is missed
    *shown, count, left_out = lines
    assert len(shown) == 10 and all(line.startswith("warning: skipped ") for line in shown)
    assert count == f"warning: {len(tried)} file(s) skipped: the run's skipped.csv lists all"
    assert left_out.startswith(
        f"warning: left out: {len(named)} images that cannot be read, "
        f"{3 + len(tried - named)} files that are no images ("
    )
    for part in (
        "folders ants/.cache/",
        "ants/@eaDir/",
        "ants/__MACOSX/",
        "ants/loop/",
        "ants/up/",
    ):
        assert part in left_out

    outcome = cnnft(
        "predict", data / "ants", data / "bees", "-m", run, "--json", "--top=2", "--batch-size=7"
    )
    assert outcome.code == 0, outcome.err
    predictions = {Path(row["file"]): row for row in json.loads(outcome.out)}
    assert predictions.keys() == good | tried
    assert {path: row["error"] for path, row in predictions.items() if row["error"]} == {
        path: skipped[path] for path in tried
    }
    assert "warning: 7 file(s) skipped" in outcome.err  # 2 by their suffix, 5 folders
    classifier = load(run, device="cpu")
    for path in good:
        (alone,) = classifier.predict(path, workers=0)
        found = {entry["class"]: entry["probability"] for entry in predictions[path]["top"]}
        assert found == pytest.approx(dict(alone.top), abs=1e-5), path
    assert len({row["probability"] for row in predictions.values()}) > 0.9 * len(good)

    strict = cnnft("finetune", data, *settings, *place, "--strict")
    missed = len(bad) + len(beside(data)) - 1  # of what systems leave there nothing is missed
    strict.fails_with(1, str(data / "ants" / ".cache"), f"(and {missed - 1} more)", "--strict")


def test_evaluate_and_check_leave_out_the_same_files(
    cnnft: Cli, trained: Path, tmp_path: Path, wild: tuple[set[Path], dict[Path, str]]
) -> None:
    (_, bad), data = wild, tmp_path / "photos"
    for command, key in ((("evaluate", "-m", trained), "file"), (("check",), "path")):
        outcome = cnnft(*command, data, "--json", "--workers=0")
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)["skipped"]
        assert {Path(file[key]) for file in found} == bad.keys() | beside(data)


def test_names_cannot_command_the_terminal(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    path = put(tmp_path / "red\x1b[31m\nerror: none.png", b"no image")
    draw_folder(tmp_path, ("ants",), 1)
    outcome = cnnft("predict", tmp_path, "-m", trained)
    assert outcome.code == 0 and "red\\x1b[31m\\nerror: none.png" in outcome.out
    assert Image.open(tmp_path / "ants" / "0.png") and "\x1b[31m" not in outcome.out + outcome.err
    path.with_name("red\x1b[31m\nerror: none.txt").touch()
    assert "skipped " in (err := cnnft("predict", tmp_path, "-m", trained).err)
    assert "\x1b[31m" not in err and "\nerror" not in err
