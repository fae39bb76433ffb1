"""Layouts of folders, what is read of them, and samples that do not depend on what held them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, draw, draw_folder

from cnnft import Config
from cnnft.config.choices import Layout
from cnnft.data.dataset import Dataset, Samples, Skipped, join
from cnnft.data.reading import inspect_dataset, read_dataset
from cnnft.data.sources import Source, open_source
from cnnft.errors import CnnftError
from cnnft.runs.weights import weights_hash
from cnnft.training.events import Finished
from cnnft.training.finetune import run_plan
from cnnft.training.plan import Plan, prepare

Cli = Callable[..., Outcome]


def files(source: Source) -> dict[str, list[str]]:
    """split/class -> names of its files."""
    found: dict[str, list[str]] = {}
    classes = source.classes("train")
    for split in source.splits:
        samples, _ = source.files(split, classes)
        for path, label in zip(samples.paths, samples.labels, strict=True):
            found.setdefault(f"{split}/{classes[label]}", []).append(Path(path).name)
    return found


def put(folder: Path, *paths: str) -> Path:
    for n, path in enumerate(paths):
        draw(folder / path, n % 3, n)
    return folder


# ---------------------------------------------------------------- layouts

FLAT = ("cats/0.png", "cats/more/1.png", "dogs/2.png")
SPLIT = ("train/cats/0.png", "train/dogs/1.png", "Valid/cats/2.png", "Valid/dogs/3.png")
CLASS_SPLIT = ("cats/train/0.png", "dogs/train/1.png", "cats/VAL/2.png", "dogs/VAL/3.png")
SEPARATED = {
    "train/cats": ["0.png"], "train/dogs": ["1.png"], "val/cats": ["2.png"], "val/dogs": ["3.png"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "paths", "expected"),
    [
        ("flat", FLAT, {"train/cats": ["0.png", "1.png"], "train/dogs": ["2.png"]}),
        ("split", SPLIT, SEPARATED),
        ("class-split", CLASS_SPLIT, SEPARATED),
    ],
)
def test_auto_finds_each_layout(
    tmp_path: Path, layout: Layout, paths: tuple[str, ...], expected: dict[str, list[str]]
) -> None:
    folder = put(tmp_path, *paths)
    for asked in ("auto", layout):
        source = open_source(folder, asked)
        assert files(source) == expected
        assert source.separated is (layout != "flat") and source.name == str(folder)


@pytest.mark.parametrize("name", ["train", "val", "test", "Testing", "validation"])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, name: str) -> None:
    """vehicles, CIFAR-100 and COCO have a class train."""
    folder = put(tmp_path, "car/0.png", f"{name}/1.png", "boat/2.png")
    if name != "train":  # without train it may as well be a split
        with pytest.raises(
            CnnftError, match=f"layout flat if .* or move boat, car into .*/train if {name} h"
        ):
            open_source(folder)
    source = open_source(folder, "auto" if name == "train" else "flat")
    assert files(source) == {"train/boat": ["2.png"], "train/car": ["0.png"],
                             f"train/{name}": ["1.png"]}  # fmt: skip
    assert not source.separated


def test_a_class_called_train_trains_and_predicts(cnnft: Cli, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "vehicles", ("car", "train", "val"), 4)
    outcome = cnnft(
        "finetune", folder, "--backbone=builtin", "--mode=feature-extractor",
        "--head-solver=sgd", "--epochs=1",
        "--workers=0", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert cnnft("evaluate", folder, "-m", outcome.out.strip(), "--workers=0").code == 0
    assert cnnft("check", folder, "--workers=0").code == 0


def test_where_two_layouts_are_possible_the_option_decides(tmp_path: Path) -> None:
    """A folder train that holds folders may be a split, or a class with folders in it."""
    folder = put(tmp_path, "train/steam/0.png", "train/diesel/1.png", "car/red/2.png")
    with pytest.raises(CnnftError, match=r"two ways.*flat if car, train are.*\(diesel, steam\)"):
        open_source(folder)
    split = open_source(folder, "split")
    assert files(split) == {"train/diesel": ["1.png"], "train/steam": ["0.png"]}
    flat = {"train/car": ["2.png"], "train/train": ["1.png", "0.png"]}
    assert files(open_source(folder, "flat")) == flat
    inside = put(tmp_path / "both", *CLASS_SPLIT)
    assert set(files(open_source(inside, "flat"))) == {"train/cats", "train/dogs"}


@pytest.mark.parametrize(
    ("paths", "classes", "layout"),
    [
        (("train/steam/0.png", "train/diesel/1.png", "car/2.png"), ("car", "train"), "flat"),
        (("train/steam/0.png", "car/2.png"), ("car", "diesel", "steam"), "split"),
        (("train/0.png", "val/1.png"), ("train", "val"), "flat"),
        (("val/cafe\u0301/0.png", "tea/1.png"), ("caf\u00e9", "tea"), "split"),
        (CLASS_SPLIT, ("cats", "dogs", "train"), "class-split"),
        (SPLIT, ("cats", "dogs"), "split"),
    ],
)
def test_the_classes_of_a_model_say_what_folders_are(
    tmp_path: Path, paths: tuple[str, ...], classes: tuple[str, ...], layout: Layout
) -> None:
    folder = put(tmp_path, *paths)
    assert files(open_source(folder, classes=classes)) == files(open_source(folder, layout))


def test_a_split_folder_that_holds_images_only_is_no_split(tmp_path: Path) -> None:
    folder = put(tmp_path, *SPLIT, "test/unlabelled.png")
    assert open_source(folder).splits == ("train", "val")


@pytest.mark.parametrize(
    ("paths", "layout", "message"),
    [
        (("train/0.png", "val/1.png"), "auto", "no class folders in them: .*--layout flat"),
        (("train/0.png",), "auto", "holds train, and there are no class folders in it"),
        (FLAT, "split", "has no folders of --layout split, such as .*train/cats"),
        (("cats/0.png", "dogs/1.png"), "class-split", "--layout class-split, such as .*cats/train"),
        ((*SPLIT, "val/cats/4.png", "val/dogs/5.png"), "auto", "are both a val folder"),
        ((*CLASS_SPLIT, "cats/valid/4.png"), "auto", "are both a val folder"),
        ((), "auto", "holds no class folders: put the images into one folder per class"),
        (("cats/0.png",), "auto", r"one class only \(cats\)"),
        (
            SPLIT[2:],
            "auto",
            "has val but no train folder that holds .*--layout flat if val is a class",
        ),
        ((*SPLIT, "Valid/cows/4.png"), "auto", "Valid/cows/ is no class of the training data"),
        ((*CLASS_SPLIT, "cows/val/4.png"), "auto", "cows/val/ is no class of the training data"),
    ],
)
def test_what_is_no_layout_is_one_sentence(
    tmp_path: Path, paths: tuple[str, ...], layout: Layout, message: str
) -> None:
    with pytest.raises(CnnftError, match=message):
        read_dataset(open_source(put(tmp_path, *paths), layout))


def test_layout_reaches_every_command(cnnft: Cli, tmp_path: Path) -> None:
    folder = put(tmp_path / "data", *CLASS_SPLIT)
    for command in (("finetune", "--dry-run", "--backbone=builtin"), ("check",)):
        cnnft(*command, folder, "--layout=split", "--workers=0").fails_with(1, "--layout split")


# ---------------------------------------------------------------- another kind of source


class Listed:
    """Not a folder: a list, as tables and archives will give."""

    name, separated, splits = "a list", True, ("train", "val", "test")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def classes(self, split: str) -> tuple[str, ...]:
        return ("ants", "bees")

    hint = ""

    def left_out(self) -> list[Skipped]:
        return [Skipped("the title", "has no file", 1, 0)]

    def notes(self, split: str, classes: tuple[str, ...]) -> list[str]:
        return [f"{split} is read"]

    def files(self, split: str, classes: tuple[str, ...]) -> tuple[Samples, list[Skipped]]:
        number = "01" if split == "train" else "23"
        paths = tuple(str(self.folder / name / f"{n}.png") for name in classes for n in number)
        groups = tuple(f"patient {n}" for _ in classes for n in number)
        samples = Samples(paths, (0, 0, 1, 1), classes, groups=groups, weights=(1.0, 2.0, 3.0, 4.0))
        return samples, [Skipped(f"row {split}", "has no file")]


def test_nothing_below_the_source_knows_a_folder(tmp_path: Path) -> None:
    source = Listed(draw_folder(tmp_path, ("ants", "bees"), 4))
    dataset = read_dataset(source, ("train", "val"))
    assert isinstance(dataset, Dataset) and dataset.source == "a list"
    assert list(dataset.splits) == ["train", "val"] and dataset.classes == ("ants", "bees")
    assert [file.path for file in dataset.skipped] == ["row train", "row val", "the title"]
    assert dataset.notes == ("train is read", "val is read")
    for split, part in dataset.splits.items():
        given, _ = source.files(split, dataset.classes)
        rows = set(zip(given.paths, given.labels, given.groups, given.weights, strict=True))
        assert set(zip(part.paths, part.labels, part.groups, part.weights, strict=True)) == rows
    same, sizes = inspect_dataset(source, lambda image, mode: (image.size, mode), ("train",))
    assert same.train == dataset.train
    assert sizes == dict.fromkeys(dataset.train.paths, ((40, 32), "RGB"))


# ---------------------------------------------------------------- samples


def samples() -> Samples:
    return Samples(
        paths=("a", "b", "c", "d", "e"),
        labels=(1, 0, 1, 0, 1),
        classes=("x", "y"),
        hashes=("3", "2", "1", "2", "1"),
        groups=("p", "q", "r", "s", "t"),
        weights=(1.0, 2.0, 3.0, 4.0, 5.0),
    )


def test_columns_stay_together() -> None:
    rows = {path: (label, digest, group, weight) for path, label, digest, group, weight in zip(
        *(getattr(samples(), name) for name in ("paths", "labels", "hashes", "groups", "weights")),
        strict=True,
    )}  # fmt: skip
    for part, paths in (
        (samples().take([4, 0]), "ea"),
        (samples().in_order(), "bdcea"),
        (samples().without(["2"]), "ace"),
        (samples().once(), "abc"),
        (samples().without([]), "abcde"),
        (join([samples().take([1]), samples().take([0])]), "ba"),
    ):
        assert "".join(part.paths) == paths
        columns = (part.labels, part.hashes, part.groups, part.weights)
        assert list(zip(*columns, strict=True)) == [rows[path] for path in paths]


def test_columns_that_are_not_known_stay_empty() -> None:
    bare = Samples(("a", "b"), (0, 1), ("x", "y"))
    assert bare.take([1]) == Samples(("b",), (1,), ("x", "y"))
    assert bare.names == (0, 1)


def test_order_and_names_follow_from_class_and_content_alone() -> None:
    ordered = samples().in_order()
    assert ordered.labels == (0, 0, 1, 1, 1) and ordered.hashes == ("2", "2", "1", "1", "3")
    assert ordered.names == ("2", ("2", 1), "1", ("1", 1), "3")
    again = samples().take([3, 4, 2, 1, 0]).in_order()
    assert (again.labels, again.hashes, again.names) == (
        ordered.labels, ordered.hashes, ordered.names,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["finetune", "feature-extractor"])
def test_the_same_images_give_the_same_weights_whatever_holds_them(
    tmp_path: Path, mode: str
) -> None:
    flat = draw_folder(tmp_path / "flat", ("ants", "bees"), 6)
    shutil.copy(flat / "ants" / "0.png", flat / "ants" / "again.png")

    def train(data: Path) -> tuple[Plan, str | None]:
        plan = prepare(Config.of(
            data, backbone="builtin", mode=mode, epochs=2, batch_size=4, workers=0, device="cpu",
            runs_dir=tmp_path / "runs", name=data.name, cache="off", augment="strong", head_lr=0.01,
        ))  # fmt: skip
        *_, last = run_plan(plan)
        assert isinstance(last, Finished)
        return plan, weights_hash(last.run.path)

    plan, expected = train(flat)
    assert expected is not None
    for number, path in enumerate(sorted(flat.glob("*/*.png"), reverse=True)):
        copy(path, tmp_path / "renamed" / path.parent.name / "deeper" / f"{number}.png")
    for split, part in (("train", plan.train), ("val", plan.val)):
        for number, (path, label) in enumerate(zip(part.paths, part.labels, strict=True)):
            name = part.classes[label]
            copy(path, tmp_path / "split" / split / name / f"{-number}.png")
            copy(path, tmp_path / "class-split" / name / split / f"{number:03}.png")
    for other in ("renamed", "split", "class-split"):
        assert train(tmp_path / other)[1] == expected, other


def copy(path: str | Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
