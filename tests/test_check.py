"""cnnft check and cnnft backbones: what they find, and what they say when nothing is there."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome, draw, draw_folder
from PIL import Image, ImageFile

from cnnft.data.checks import PLAIN, Inspector
from cnnft.data.loading import Loading
from cnnft.data.reading import read_dataset
from cnnft.data.statistics import channel_statistics
from cnnft.models.identity import input_spec
from cnnft.models.registry import resolve

Cli = Callable[..., Outcome]


@pytest.fixture
def check(cnnft: Cli, tmp_path: Path) -> Callable[..., dict]:
    def run(*arguments: object) -> dict:
        outcome = cnnft("check", "--json", "--workers", 0, *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


def names(groups: list[list[str]]) -> list[set[str]]:
    return [{"/".join(Path(path).parts[-3:]) for path in group} for group in groups]


def photo(path: Path, seed: int) -> Path:
    """Blots, unlike each other: stripes all look alike."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((180, 140), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    data = tmp_path / "photos"
    for i, part in enumerate(("train/ants", "train/bees", "val/ants", "val/bees")):
        for n in range(4):
            photo(data / part / f"{n}.png", 10 * i + n)
    return data


def test_nothing_is_found_where_nothing_is(check, photos: Path) -> None:
    found = check(photos)
    assert found["counts"] == {"train": {"ants": 4, "bees": 4}, "val": {"ants": 4, "bees": 4}}
    for finding in ("skipped", "duplicates", "near_duplicates", "leaks", "contradictions"):
        assert found[finding] == [], finding
    assert found["sizes"] == {"smallest": 140, "median": 140, "largest": 140}
    assert found["modes"] == {"RGB": 16} and found["imbalance"] == 1 and found["advice"] is None


def test_every_kind_of_finding(check, photos: Path) -> None:
    shutil.copy(photos / "train/ants/0.png", photos / "train/bees/copy.png")
    Image.open(photos / "train/ants/1.png").resize((90, 70)).save(photos / "val/ants/resaved.jpg")
    brighter = Image.open(photos / "train/ants/2.png").point(lambda value: value * 1.15)
    brighter.save(photos / "train/bees/brighter.png")
    Image.open(photos / "train/ants/3.png").convert("L").save(photos / "train/ants/grey.png")
    (photos / "val/bees/broken.jpg").write_bytes(b"no image")
    found = check(photos)
    assert names(found["duplicates"]) == [{"train/ants/0.png", "train/bees/copy.png"}]
    assert names(found["near_duplicates"]) == [
        {"train/ants/1.png", "val/ants/resaved.jpg"},
        {"train/ants/2.png", "train/bees/brighter.png"},
    ]
    assert names(found["leaks"]) == [{"train/ants/1.png", "val/ants/resaved.jpg"}]
    assert names(found["contradictions"]) == [
        {"train/ants/0.png", "train/bees/copy.png"},
        {"train/ants/2.png", "train/bees/brighter.png"},
    ]
    assert [Path(file["path"]).name for file in found["skipped"]] == ["broken.jpg"]
    assert found["modes"] == {"RGB": 19, "L": 1}


def test_the_test_folder_is_looked_at_too(check, photos: Path) -> None:
    (photos / "test" / "bees").mkdir(parents=True)
    shutil.copy(photos / "train/bees/0.png", photos / "test/bees/seen before.png")
    found = check(photos)
    assert found["counts"]["test"] == {"ants": 0, "bees": 1}
    assert names(found["leaks"]) == [{"train/bees/0.png", "test/bees/seen before.png"}]


def test_flat_pictures_are_not_all_the_same(check, photos: Path) -> None:
    for n in range(3):
        Image.new("RGB", (60, 60), (n * 80, 90, 120)).save(photos / f"train/ants/flat{n}.png")
    assert check(photos)["near_duplicates"] == []


def test_classes_that_differ_in_colour_only(check, tmp_path: Path) -> None:
    for name, colour in (("green", (60, 170, 60)), ("red", (200, 60, 60))):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for n in range(10):
            mask = np.random.default_rng(n).random((6, 6, 1)) > 0.5
            shape = np.where(mask, colour, 240).astype(np.uint8).repeat(16, 0).repeat(16, 1)
            Image.fromarray(shape).save(tmp_path / "colours" / name / f"{n}.png")
    found = check(tmp_path / "colours")
    assert found["near_duplicates"] == found["contradictions"] == []


def test_a_chain_of_pictures_is_not_one_group(check, photos: Path) -> None:
    """A camera that turns: neighbours look the same, the first and the last do not."""
    wide = photo(photos / "train/ants/0.png", 0)
    with Image.open(wide) as image:
        wide_image = image.resize((360, 280))
    wide.unlink()
    for n in range(12):
        view = wide_image.crop((6 * n, 0, 6 * n + 252, 280))
        view.save(photos / "train" / ("ants" if n < 6 else "bees") / f"view{n:02d}.png")
    found = check(photos)
    groups = [sorted(int(Path(p).stem[4:]) for p in group) for group in found["near_duplicates"]]
    assert {n for group in groups for n in group} == set(range(12))
    assert all(group[-1] - group[0] <= 4 for group in groups)
    (conflict,) = names(found["contradictions"])
    assert {"train/ants/view05.png", "train/bees/view06.png"} <= conflict


def test_text_says_what_json_says(cnnft: Cli, photos: Path) -> None:
    shutil.copy(photos / "train/ants/0.png", photos / "val/ants/again.png")
    outcome = cnnft("check", photos, "--backbone", "builtin", "--workers", 0)
    assert outcome.code == 0, outcome.err
    assert "1               the same file more than once" in outcome.out
    assert "1               in train and elsewhere too" in outcome.out
    assert "none            left out" in outcome.out
    assert "→ " in outcome.out and "4 training images per class" in outcome.out


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_every_file_is_read_and_decoded_once(
    check, photos: Path, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    reads: Counter[str] = Counter()
    decodes: list[object] = []
    read, prepare = Path.read_bytes, ImageFile.ImageFile.load_prepare
    shutil.copy(photos / "train/ants/0.png", photos / "train/bees/copy.png")
    Image.open(photos / "train/ants/1.png").save(photos / "val/ants/resaved.jpg")
    (photos / "train/bees/broken.jpg").write_bytes(b"no image")

    def reading(path: Path) -> bytes:
        reads[str(path)] += 1
        return read(path)

    def decoding(image: ImageFile.ImageFile) -> None:
        decodes.append(image)
        prepare(image)

    monkeypatch.setattr(Path, "read_bytes", reading)
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", decoding)
    found = check(photos, "--backbone", "builtin", "--fit", fit)
    assert found["advice"]["images_per_class"] == 4
    files = {str(path) for path in photos.glob("*/*/*")}
    assert {path: n for path, n in reads.items() if path in files} == dict.fromkeys(files, 1)
    assert len(decodes) == len(files) - 1  # all but the broken one


def test_crops_beyond_the_room_are_decoded_again_and_the_advice_is_the_same(
    check, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = check(flat, "--backbone", "builtin")["advice"]
    assert Inspector(PLAIN, keep_crops=False)(Image.new("RGB", (9, 9)), "L").crop is None
    monkeypatch.setattr("cnnft.data.checks.available", lambda device: 5 * 4 * 3 * 64**2)
    monkeypatch.setenv("CNNFT_CACHE", str(flat.parent / "another"))  # of features
    assert check(flat, "--backbone", "builtin")["advice"] == advice


def test_statistics_are_those_that_training_would_take(check, photos: Path) -> None:
    dataset = read_dataset(photos)
    for fit in ("crop", "squash", "pad"):
        found = check(photos, "--backbone", "builtin", "--fit", fit)
        spec = replace(input_spec(resolve("builtin")), fit=fit)
        mean, std = channel_statistics(dataset.train.paths, spec, Loading(3, 0))
        assert found["mean"] == pytest.approx(mean) and found["std"] == pytest.approx(std)


def test_check_of_what_is_not_there(cnnft: Cli, tmp_path: Path, flat: Path) -> None:
    cnnft("check", tmp_path / "nothing").fails_with(2, "no such folder")
    cnnft("check", "").fails_with(2, "DATA is empty")
    cnnft("check", flat, "--backbone", "resnet81").fails_with(2, "did you mean resnet")
    cnnft("check", flat, "--fit", "pad").fails_with(2, "give --backbone too")
    draw(tmp_path / "one" / "ants" / "0.png", 0, 0)
    cnnft("check", tmp_path / "one").fails_with(1, "one class only")


def test_what_finetune_would_refuse_is_told(cnnft: Cli, check, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 3)
    assert check(data)["finetune_refuses"] is None
    for n in range(3):
        (data / "bees" / f"{n}.png").write_bytes(b"torn")
    assert "class bees has no image to train on" in check(data)["finetune_refuses"]
    assert "finetune stops at this" in cnnft("check", data).err
    cnnft("finetune", data, "--backbone", "builtin").fails_with(1, "class bees has no image")


# ---------------------------------------------------------------- backbones


def test_backbones_lists_what_matches(cnnft: Cli) -> None:
    found = json.loads(cnnft("backbones", "torchvision/resnet*", "--json").out)
    assert [entry["name"] for entry in found] == [
        f"torchvision/resnet{depth}" for depth in (101, 152, 18, 34, 50)
    ]
    fifty = found[-1]
    assert (fifty["parameters"], fifty["input_size"], fifty["stages"]) == (23508032, 224, 5)
    assert [w["name"] for w in fifty["weights"]] == [
        "torchvision/resnet50@IMAGENET1K_V2",
        "torchvision/resnet50@IMAGENET1K_V1",
    ]


def test_a_part_of_the_name_is_enough(cnnft: Cli) -> None:
    found = json.loads(cnnft("backbones", "resnet18", "--json").out)
    assert {"resnet18", "resnet18d", "seresnet18", "torchvision/resnet18"} <= {
        entry["name"] for entry in found
    }
    (timms,) = (entry for entry in found if entry["name"] == "resnet18")
    assert timms["weights"][0]["name"] == "resnet18.a1_in1k"
    assert timms["weights"][0]["licence"] == "apache-2.0"


def test_the_builtin_one_is_here(cnnft: Cli) -> None:
    (entry,) = json.loads(cnnft("backbones", "builtin", "--json").out)
    assert entry["weights"][0]["local"] is True and entry["refused"] is None


def test_backbones_as_text(cnnft: Cli) -> None:
    outcome = cnnft("backbones", "torchvision/alexnet")
    assert "torchvision/alexnet" in outcome.out and "224 px" in outcome.out
    assert "1 backbones" in outcome.err


def test_backbones_that_do_not_exist(cnnft: Cli) -> None:
    cnnft("backbones", "resnet1800").fails_with(2, "resnet1800", "lists all")
