"""Folders -> samples, splits and batches."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw, draw_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from cnnft.data import reading, sources
from cnnft.data.dataset import HIDDEN, LINK, Samples, Skipped
from cnnft.data.folders import Tree, image_files
from cnnft.data.loading import TrainingImages
from cnnft.data.reading import read_dataset
from cnnft.data.sampler import IGNORED, BalancedDraw, KeyedBatches
from cnnft.data.split import split
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]

# ---------------------------------------------------------------- files and classes


def test_classes_and_files_come_in_imagefolders_order(tmp_path: Path) -> None:
    for name in ("bee", "Ant", "ant", "Zebra", "10", "9", "_x", "élan", "a b"):
        draw(tmp_path / name / "2.png", 0, 0)
        draw(tmp_path / name / "10.png", 0, 0)
        draw(tmp_path / name / "B.PNG", 0, 0)
        draw(tmp_path / name / "more" / "1.png", 0, 0)
        draw(tmp_path / name / "more" / "deep" / "1.png", 0, 0)
    reference = ImageFolder(str(tmp_path))
    source = sources.open_source(tmp_path)
    classes = source.classes("train")
    samples, _ = source.files("train", classes)
    assert list(samples.classes) == reference.classes
    assert list(zip(samples.paths, samples.labels, strict=True)) == reference.samples


@pytest.mark.parametrize(
    "name",
    [".hidden.png", "._x.png", "__MACOSX/x.png", ".git/x.png", "sub/.x.png", "thumbs.db", ".txt"],
)
def test_hidden_files_and_what_systems_leave_behind_are_ignored(tmp_path: Path, name: str) -> None:
    seen = draw(tmp_path / "seen.png", 0, 0)
    hidden = tmp_path / name
    hidden.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(seen, hidden)
    images, (left_out,) = image_files(tmp_path)
    assert images == [str(seen)] and left_out.reason == HIDDEN and left_out.files == 1
    assert left_out.images == name.endswith((".hidden.png", "/x.png", "/.x.png"))
    assert Path(left_out.path) in (hidden, hidden.parent)
    found, _ = Tree(tmp_path, include_hidden=True).contents(str(tmp_path))
    assert (str(hidden) in found) == name.endswith(".png")


def test_files_of_other_suffixes_are_listed_and_those_without_one_are_tried(tmp_path: Path) -> None:
    seen = draw(tmp_path / "seen.png", 0, 0)
    for name in ("notes.txt", "sub/x.svg", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == (
        [str(tmp_path / "README"), str(seen)],
        [
            Skipped(str(tmp_path / "notes.txt"), "has no image suffix (.txt)", 1, 0),
            Skipped(str(tmp_path / "sub" / "x.svg"), "has no image suffix (.svg)", 1, 0),
        ],
    )


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    draw_folder(tmp_path, ("ants", "bees", ".thumbnails", "__MACOSX"), 1)
    (tmp_path / "README.md").touch()
    assert sources.open_source(tmp_path).classes("train") == ("ants", "bees")
    everything = sources.open_source(tmp_path, include_hidden=True)
    assert everything.classes("train") == (".thumbnails", "__MACOSX", "ants", "bees")


def test_symbolic_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    target = draw(tmp_path / "elsewhere" / "x.png", 0, 0)
    folder = tmp_path / "ants"
    own = draw(folder / "own.png", 0, 1)
    (folder / "linked").symlink_to(target.parent, target_is_directory=True)
    (folder / "one.png").symlink_to(target)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (target.parent / "back").symlink_to(folder, target_is_directory=True)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    expected = [folder / "one.png", own, folder / "linked" / "x.png"]
    images, left_out = image_files(folder)
    assert images == [str(path) for path in expected]
    assert {(entry.path, entry.reason, entry.files) for entry in left_out} == {
        (f"{folder / name}{os.sep}", LINK, 1) for name in ("linked/back", "loop", "up")
    }


def test_a_dangling_link_is_skipped_with_its_reason(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path, ("ants", "bees"), 2)
    (folder / "ants" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    good = read_dataset(folder)
    assert len(good.train) == 4 and [Path(s.path).name for s in good.skipped] == ["gone.png"]
    assert good.skipped[0].reason == "cannot be read (a link to nothing)"


def test_reading_hashes_the_content_and_counts_every_file(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path, ("ants", "bees"), 3)
    (folder / "ants" / "1.png").write_bytes(b"no image")
    (folder / "bees" / "notes.txt").touch()
    counts: list[tuple[int, int | None]] = []
    dataset = read_dataset(folder, on_files=lambda *count: counts.append(count))
    assert counts == [(3, None), (3, None)] + 6 * [(1, 6)]
    assert [Path(s.path).name for s in dataset.skipped] == ["1.png", "notes.txt"]
    train = dataset.train
    assert train.labels == (0, 0, 1, 1, 1) and dataset.source == str(folder)
    assert list(train.hashes) == [
        hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in train.paths
    ]
    assert train.hashes[:2] == tuple(sorted(train.hashes[:2]))


def test_few_files_are_under_way_at_a_time() -> None:
    taken = 0

    def paths() -> Iterator[str]:
        nonlocal taken
        for taken in range(1, 5001):
            yield str(taken)

    results = reading.in_threads(int, paths())
    for expected in range(1, 5001):
        assert next(results) == expected and taken - expected < 1000
    assert list(results) == []


# ---------------------------------------------------------------- splitting


def made_up(counts: tuple[int, ...], prefix: str = "") -> Samples:
    """Samples whose content is named, not stored."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Samples(
        paths=tuple(f"{prefix}{label}-{i}.png" for i, label in enumerate(labels)),
        labels=tuple(labels),
        classes=tuple(f"class{label}" for label in range(len(counts))),
        hashes=tuple(hashlib.sha256(f"{i}".encode()).hexdigest() for i in range(len(labels))),
    )


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_is_stratified_and_loses_nothing(
    counts: list[int], fraction: float, seed: int
) -> None:
    samples = made_up(tuple(counts))
    train, val = split(samples, fraction, seed)
    assert sorted(train.paths + val.paths) == sorted(samples.paths)
    assert not set(train.hashes) & set(val.hashes)
    for count, in_train, in_val in zip(counts, train.counts(), val.counts(), strict=True):
        assert in_train >= 1 and in_val >= 1
        assert abs(in_val - fraction * count) <= 1


def test_split_ignores_names_and_order() -> None:
    samples = made_up((20, 15))
    _, val = split(samples, 0.3, 0)
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    shuffled = samples.take(order)
    renamed = replace(shuffled, paths=tuple(f"{i}.jpg" for i in range(len(samples))))
    _, again = split(renamed, 0.3, 0)
    assert set(again.hashes) == set(val.hashes)


def test_split_depends_on_the_split_seed_and_grows_by_adding() -> None:
    samples = made_up((30, 30))
    chosen = {seed: set(split(samples, 0.2, seed)[1].hashes) for seed in range(4)}
    assert len(set(map(frozenset, chosen.values()))) == 4
    assert chosen[0] < set(split(samples, 0.5, 0)[1].hashes)


def test_split_of_a_class_does_not_depend_on_other_classes() -> None:
    both = made_up((20, 20))
    alone = both.take(i for i in range(40) if both.labels[i] == 0 or i < 25)
    of_both, of_alone = (
        {h for h, label in zip(val.hashes, val.labels, strict=True) if label == 0}
        for _, val in (split(both, 0.3, 0), split(alone, 0.3, 0))
    )
    assert of_both == of_alone


@pytest.mark.parametrize("seed", range(8))
def test_exact_duplicates_stay_on_one_side_also_across_classes(seed: int) -> None:
    samples = made_up((6, 6))
    hashes = list(samples.hashes)
    hashes[1] = hashes[2] = hashes[0]  # within a class
    hashes[6] = hashes[7] = hashes[3]  # across classes
    samples = replace(samples, hashes=tuple(hashes))
    train, val = split(samples, 0.4, seed)
    assert len(train) + len(val) == 12
    assert not set(train.hashes) & set(val.hashes)
    assert min(train.counts()) >= 1 and min(val.counts()) >= 1


def test_a_class_of_one_content_is_trained_and_not_validated() -> None:
    samples = made_up((3, 2, 1))
    same = replace(samples, hashes=(*samples.hashes[:4], samples.hashes[3], samples.hashes[5]))
    train, val = split(same, 0.2, 0)
    assert train.counts() == (2, 2, 1) and val.counts() == (1, 0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_class_of_copies_of_another_is_trained_too(seed: int) -> None:
    samples = made_up((4, 2))
    copies = replace(samples, hashes=(*samples.hashes[:4], *samples.hashes[:2]))
    train, val = split(copies, 0.5, seed)
    assert min(train.counts()) >= 1 and val.counts()[0] >= 1
    assert not set(train.hashes) & set(val.hashes) and len(train) + len(val) == 6


def split_of(run: Path) -> dict[str, Counter[str]]:
    """split -> content hashes."""
    splits = Run.open(run).dataset().splits
    return {split: Counter(samples.hashes) for split, samples in splits.items()}


def test_a_runs_split_ignores_names_and_training_seed_but_not_split_seed(
    cnnft: Cli, flat: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    for path in flat.glob("*/*.png"):
        (renamed / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed / path.parent.name / f"copy{9 - int(path.stem)}.png")

    def train(name: str, *arguments: object) -> dict[str, Counter[str]]:
        common = [
            "--backbone=builtin",
            "--mode=feature-extractor",
            "--head-solver=sgd",
            "--epochs=1",
            "--workers=0",
        ]
        place = ["--runs-dir", tmp_path / "runs", "--name", name]
        assert cnnft("finetune", *arguments, *common, *place).code == 0
        return split_of(tmp_path / "runs" / name)

    first = train("first", flat)
    assert [sum(first[split].values()) for split in ("train", "val")] == [16, 4]
    assert train("renamed", renamed, "--seed", 5) == first
    assert train("other", flat, "--split-seed", 1) != first


# ---------------------------------------------------------------- given train and val folders


def test_validation_images_that_are_in_training_are_left_out_and_counted(
    cnnft: Cli, separated: Path, tmp_path: Path
) -> None:
    train, val = separated / "train", separated / "val"
    shutil.copy(train / "ants" / "0.png", val / "ants" / "leak.png")
    shutil.copy(train / "bees" / "1.png", val / "wasps" / "another name.png")  # across classes
    common = ["--backbone", "builtin", "--workers", 0, "--runs-dir", tmp_path / "runs"]
    plan = cnnft("finetune", separated, *common, "--dry-run", "--json")
    left_out = {e["file"]: e["reason"] for e in json.loads(plan.out)["skipped"]}
    assert left_out == dict.fromkeys(
        map(str, (val / "ants" / "leak.png", val / "wasps" / "another name.png")),
        "in val: the same file is in train",
    )
    assert "1 image(s) lie under two classes" in plan.err
    assert {c: n["val"] for c, n in json.loads(plan.out)["classes"].items()} == {
        "ants": 3, "bees": 3, "wasps": 3,
    }  # fmt: skip
    assert "in val: the same file is in train" in plan.err
    cnnft("finetune", separated, *common, "--strict").fails_with(1, "leak.png", "in train")

    arguments = ["--mode", "feature-extractor", "--epochs", 1, "--name", "x"]
    assert cnnft("finetune", separated, *common, *arguments).code == 0
    used = (tmp_path / "runs" / "x" / "data.csv").read_text()
    assert "leak" not in used and "another name" not in used
    split = split_of(tmp_path / "runs" / "x")
    assert not split["train"].keys() & split["val"].keys()
    assert sum(split["train"].values()) == 18 and sum(split["val"].values()) == 9


# ---------------------------------------------------------------- batches


@settings(max_examples=150, deadline=None)
@given(
    images=st.integers(1, 70),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 3),
)
def test_every_image_once_an_epoch_and_no_batch_of_one(
    images: int, batch_size: int, seed: int, epochs: int
) -> None:
    keys = KeyedBatches(images, batch_size, seed, epochs)
    batches = list(keys)
    assert len(batches) == len(keys) == epochs * keys.steps_per_epoch
    for epoch in range(epochs):
        of_epoch = batches[epoch * keys.steps_per_epoch : (epoch + 1) * keys.steps_per_epoch]
        assert sorted(key for batch in of_epoch for key in batch) == [
            (epoch, index) for index in range(images)
        ]
        assert all(len(batch) == batch_size for batch in of_epoch[:-1])
        assert 1 <= len(of_epoch[-1]) <= batch_size + 1
    if batch_size > 1 and images > 1:
        assert min(map(len, batches)) > 1
    assert list(KeyedBatches(images, batch_size, seed, epochs)) == batches


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = {tuple(KeyedBatches(50, 50, seed, 2).at(epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


LABELS = random.Random(0).sample(range(4), counts=(600, 300, 90, 10), k=1000)


def balanced(epochs: int = 2, first_step: int = 0) -> KeyedBatches:
    return KeyedBatches(len(LABELS), 32, 7, epochs, first_step, BalancedDraw(LABELS))


def test_a_balanced_epoch_draws_classes_alike_and_images_of_a_class_alike() -> None:
    keys = [key for batch in balanced(epochs=40) for key in batch]
    assert len(keys) == len(set(keys)) == 40_000  # no view is seen twice
    found = Counter(LABELS[index] for _, index, _ in keys)
    assert [found[label] / 40_000 for label in range(4)] == pytest.approx([0.25] * 4, abs=0.01)
    of_last = Counter(index for _, index, _ in keys if LABELS[index] == 3)
    assert len(of_last) == 10
    assert min(of_last.values()) > 850 and max(of_last.values()) < 1150  # of about 1000 each
    assert {index for _, index, _ in keys} == set(range(1000))


def test_balanced_batches_are_a_function_of_the_step() -> None:
    whole = list(balanced())
    assert list(balanced()) == whole and list(balanced(first_step=20)) == whole[20:]
    assert [[index for _, index, _ in batch] for batch in whole] == [
        balanced().at(step) for step in range(len(whole))
    ]
    assert whole[0] != whole[balanced().steps_per_epoch]  # another epoch, another draw


def test_an_image_that_is_drawn_twice_gets_another_view(tmp_path: Path) -> None:
    samples = read_dataset(draw_folder(tmp_path, ("ants", "bees"), 2)).train
    images = TrainingImages(samples, lambda image: torch.rand(4), seed=0)
    views = [images[key][0] for key in [(0, 1), (0, 1, 5), (0, 1, 6), (1, 1, 5)]]
    assert len({tuple(view.tolist()) for view in views}) == 4
    assert torch.equal(images[0, 1, 5][0], views[1]) and images[0, ~1, 5][1] == IGNORED


def test_an_images_random_view_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    samples = read_dataset(draw_folder(tmp_path, ("ants", "bees"), 2)).train

    def transform(image: object) -> torch.Tensor:
        return torch.rand(4)

    first, second = (TrainingImages(samples, transform, seed) for seed in (0, 1))
    state = torch.get_rng_state()
    views = {key: first[key] for key in [(0, 0), (0, 1), (1, 0)]}
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for key, (view, label) in reversed(views.items()):
        again = first[key]
        assert torch.equal(again[0], view) and again[1] == label
    distinct = [view for view, _ in [*views.values(), second[0, 0]]]
    assert len({tuple(view.tolist()) for view in distinct}) == 4
