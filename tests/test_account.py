"""Everything below DATA is used once, or left out and named: docs/data.md, line by line."""

import csv
import json
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, draw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnnft.cli.leftout import summary
from cnnft.data.dataset import (
    BESIDE_CLASSES,
    BESIDE_SPLITS,
    HIDDEN,
    LINK,
    OWN,
    UNSUITED,
    Dataset,
    Skipped,
)
from cnnft.data.folders import Tree, image_files
from cnnft.data.reading import read_dataset
from cnnft.data.sources import open_source
from cnnft.errors import CnnftError
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]

OLD = Path(__file__).parent / "old"


def put(folder: Path, *paths: str) -> Path:
    """Each a file: a picture of its own where it is called .png, else some text."""
    for n, path in enumerate(paths):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".png":
            Image.new("RGB", (9, 9), (n % 256, n // 256, 99)).save(target)
        else:
            target.write_text("text")
    return folder


def classes_of(dataset: Dataset) -> dict[str, dict[str, int]]:
    return {split: samples.counts_by_class() for split, samples in dataset.splits.items()}


# ---------------------------------------------------------------- the invariant

BASES = {
    "flat": ("cats/0.png", "dogs/0.png", "dogs/deep/1.png"),
    "split": ("train/cats/0.png", "train/dogs/0.png", "val/cats/1.png", "test/dogs/2.png"),
    "class-split": ("cats/train/0.png", "dogs/train/0.png", "cats/val/1.png", "dogs/test/2.png"),
}
FOLDERS = ("cats", "dogs", "train", "val", "test", "Train", ".git", "@eaDir", "more", "runs")
FILES = ("a.png", "b.png", "broken.png", "bare", "x.txt", "y.TXT", "z.0001", ".a.png", "._b.jpg",
         "Thumbs.db", "empty/", "link", "up", "gone.png")  # fmt: skip
ADDED = st.lists(
    st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(FILES)), max_size=12
)


def add(root: Path, folders: list[str], name: str, number: int) -> None:
    target = root.joinpath(*folders, name)
    if any(parent.is_symlink() for parent in target.parents) or os.path.lexists(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        target.mkdir()
    elif name == "link":
        target.symlink_to(root / "cats")
    elif name == "up":
        target.symlink_to(target.parent)
    elif name == "gone.png":
        target.symlink_to("nowhere")
    elif name in ("a.png", "b.png", ".a.png"):
        Image.new("RGB", (5, 5), (number, 7, 7)).save(target)
    else:
        target.write_text("text")


def is_image(path: str) -> bool:
    name = Path(path).name
    return name.lower().endswith((".png", ".jpg")) and not name.startswith("._")


def below(folder: str) -> set[str]:
    """Every entry that is no folder; a link is an entry."""
    found = set()
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        found |= {str(Path(root, name)) for name in [*names, *links]}
    return found


def fits(entry: Skipped, path: str) -> bool:
    """Whether the entry, several files of one kind, is about this file."""
    folder, name = str(Path(entry.path).parent), Path(path).name
    if not path.startswith(folder + os.sep):
        return False
    inside = path.removeprefix(folder + os.sep)
    if entry.reason == HIDDEN:
        return name.startswith(".") or name == "Thumbs.db"
    if entry.reason in (BESIDE_CLASSES, BESIDE_SPLITS):
        return os.sep not in inside and is_image(path)
    suffix = name.lower().rpartition(".")[2] if "." in name else ""
    kind = f"{UNSUITED} (.{suffix})" if suffix in ("txt", "db") else UNSUITED
    plain = not is_image(path) and (suffix or os.sep not in inside)
    return entry.reason == kind and bool(plain)


def require_accounted(root: str, dataset: Dataset) -> None:
    used = [path for samples in dataset.splits.values() for path in samples.paths]
    assert len(used) == len(set(used))
    folders = [entry for entry in dataset.skipped if entry.is_folder]
    single = {e.path for e in dataset.skipped if not e.is_folder and not e.path.endswith("*")}
    several = [entry for entry in dataset.skipped if entry.path.endswith("*")]
    seen: Counter[int] = Counter()
    for path in below(root):
        whole = [e for e in folders if path.startswith(e.path) or path + os.sep == e.path]
        followed = any(other.startswith(path + os.sep) for other in [*used, *single]) or any(
            e.path.startswith(path + os.sep) for e in [*several, *folders] if e not in whole
        )
        times = len(whole) + (path in single) + (path in used) + followed
        if not times:
            fitting = [entry for entry in several if fits(entry, path)]
            fitting = [entry for entry in fitting if entry.reason == HIDDEN] or fitting
            deepest = max(len(entry.path) for entry in fitting)
            (entry,) = (e for e in fitting if len(e.path) == deepest)
            seen[several.index(entry)] += 1
            times = 1
        assert times == 1, (path, dataset)
    for entry in folders:
        if entry.reason == LINK:
            assert (entry.files, entry.images) == (1, 0)
        elif not Path(entry.path).is_symlink():
            inside = below(entry.path.rstrip(os.sep))
            assert (entry.files, entry.images) == (len(inside), sum(map(is_image, inside))), entry
    for number, entry in enumerate(several):
        folder = Path(entry.path).parent
        followed = any(path.is_dir() and path.is_symlink() for path in folder.rglob("*"))
        if not followed and not any(path.is_symlink() for path in (folder, *folder.parents)):
            assert seen[number] == entry.files > 1, entry


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(list(BASES)), ADDED, st.booleans(), st.booleans())
@example("split", [([], "a.png"), ([], "b.png"), (["train"], "a.png"), (["more"], "a.png")],
         True, False)  # fmt: skip
@example("flat", [(["cats", ".git"], "a.png"), (["cats"], "up"), (["more"], "link")], True, True)
def test_every_file_is_used_once_or_covered_once(
    base: str, added: list[tuple[list[str], str]], auto: bool, include_hidden: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = put(Path(place, "data"), *BASES[base])
        for number, (folders, name) in enumerate(added):
            add(root, folders, name, number)
        try:
            layout = "auto" if auto else base
            dataset = read_dataset(open_source(root, layout, include_hidden=include_hidden))
        except CnnftError:  # a layout that is none: other tests are about which
            return
        require_accounted(str(root), dataset)


# ---------------------------------------------------------------- layouts

READ = {
    "a class may be called train": (
        ("bus/0.png", "train/0.png", "test/0.png"),
        {"train": {"bus": 1, "test": 1, "train": 1}}, ""),
    "notes of a camera are no mark of a run": (
        ("a/session/0.png", "a/session/config.toml", "b/0.png"),
        {"train": {"a": 1, "b": 1}}, "1 file that is no image (1 .toml)"),
    "images beside class folders": (
        ("a/0.png", "b/0.png", "0.png", "1.png", "labels.csv", "LICENSE"),
        {"train": {"a": 1, "b": 1}},
        "2 images beside the class folders, 2 files that are no images (1 .csv, 1 other)"),
    "the same in train": (
        ("train/a/0.png", "train/b/0.png", "train/0.png", "train/1.png"),
        {"train": {"a": 1, "b": 1}}, "2 images beside the class folders"),
    "Kaggle's test, with only train": (
        ("train/a/0.png", "train/b/0.png", "test/0.png", "test/1.png"),
        {"train": {"a": 1, "b": 1}},
        "folder test/ (unlabelled: no class folders in it; 2 images)"),
    "Kaggle's test and sample": (
        ("train/a/0.png", "train/b/0.png", "test/0.png", "sample/0.png", "sample.csv"),
        {"train": {"a": 1, "b": 1}},
        "1 file that is no image (1 .csv), folders sample/, test/ "
        "(unlabelled: no class folders in it; 2 images)"),
    "labelled folders beside a split": (
        ("train/a/0.png", "train/b/0.png", "val/a/0.png", "extra/a/0.png"),
        {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 0}},
        "folder extra/ (beside the split folders; 1 image)"),
    "an empty class, and one of other files": (
        ("a/0.png", "b/0.png", "c/x.csv", "d/"),
        {"train": {"a": 1, "b": 1}}, "folders c/, d/ (no images)"),
    "a folder of documents": (
        ("a/0.png", "b/0.png", "docs/LICENSE", "docs/README"),
        {"train": {"a": 1, "b": 1}}, "folder docs/ (no images)"),
    "hidden images": (
        ("a/0.png", "b/0.png", "a/.ipynb_checkpoints/0.png", "@eaDir/1.png", "b/.x.png", ".git/x",
         "a/.y.png"),
        {"train": {"a": 1, "b": 1}},
        "2 hidden images in a/.y.png, b/.x.png, "
        "folders @eaDir/, a/.ipynb_checkpoints/ (hidden, or left by the system; 2 images)"),
    "what nobody misses": (("a/0.png", "b/0.png", "a/.DS_Store", "Thumbs.db", ".git/x"),
        {"train": {"a": 1, "b": 1}}, ""),
    "class-split, with a class in val too": (
        ("a/train/0.png", "b/train/0.png", "a/val/1.png", "b/loose.png", "b/extra/0.png"),
        {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 0}},
        "1 image beside the split folders, folder b/extra/ (beside the split folders; 1 image)"),
    "images beside the splits of several classes": (
        ("a/train/0.png", "b/train/0.png", "a/1.png", "b/2.png", "b/3.png"),
        {"train": {"a": 1, "b": 1}}, "3 images beside the split folders"),
    "a class to convert, and one to unpack": (
        ("a/0.png", "b/0.png", "c/0.CR2", "c/x.xmp", "d/more/0.zip"),
        {"train": {"a": 1, "b": 1}},
        "folder c/ (only images in formats that cnnft does not read, to be converted), "
        "folder d/ (only archives, to be unpacked)"),
    "a file without a suffix": (
        ("a/0.png", "b/0.png", "a/README"),
        {"train": {"a": 1, "b": 1}}, "1 file that is no image (1 other)"),
    "one name that says test, and classes of classes": (
        ("test_tube/old/0.png", "flask/old/0.png", "oval/old/0.png"),
        {"train": {"flask": 1, "oval": 1, "test_tube": 1}}, ""),
    "names that differ in case": (
        ("cat/0.png", "Cat/0.png", "None/0.png", "0/0.png", "file/0.png"),
        {"train": {"0": 1, "Cat": 1, "None": 1, "cat": 1, "file": 1}}, ""),
}  # fmt: skip


def make(folder: Path, paths: tuple[str, ...]) -> Path:
    put(folder, *(path for path in paths if not path.endswith("/")))
    for path in paths:
        if path.endswith("/"):
            (folder / path).mkdir()
    return folder


@pytest.mark.parametrize(("paths", "classes", "left_out"), READ.values(), ids=READ)
def test_what_is_read_and_what_is_said_of_the_rest(
    tmp_path: Path, paths: tuple[str, ...], classes: dict[str, dict[str, int]], left_out: str
) -> None:
    dataset = read_dataset(make(tmp_path / "data", paths))
    assert classes_of(dataset) == classes
    assert summary(dataset.skipped, dataset.source) == left_out
    require_accounted(dataset.source, dataset)


REFUSED = {
    "a split and classes beside it": (
        ("bus/0.png", "car/0.png", "train/steam/0.png", "train/electric/0.png"),
        r"two ways: give --layout flat if bus, car, train are the classes, or --layout split if "
        r"train holds the training images \(electric, steam\) and bus, car should be left out"),
    "test and classes beside it": (
        ("cats/0.png", "dogs/0.png", "test/cats/0.png"),
        r"--layout flat if cats, dogs, test are the classes, or move cats, dogs into .*train if "
        r"test holds images to evaluate on \(cats\)"),
    "unlabelled val and test beside classes": (
        ("cats/0.png", "dogs/0.png", "test/0.png", "val/0.png"),
        r"--layout flat if cats, dogs, test, val are the classes, or move cats, dogs into .*train "
        r"if test, val hold images to evaluate on"),
    "splits under other names": (
        ("seg_train/a/0.png", "seg_train/b/0.png", "seg_test/a/0.png", "seg_pred/0.png"),
        r"flat if seg_pred, seg_test, seg_train are the classes, or move .*/seg_test to .*/test, "
        r".*/seg_train to .*/train if the classes are a"),
    "the same, one deeper": (
        ("seg_train/seg_train/a/0.png", "seg_train/seg_train/b/0.png", "seg_test/seg_test/a/0.png",
         "seg_test/seg_test/b/0.png"),
        r"or move .*/seg_test/seg_test to .*/test, .*/seg_train/seg_train to .*/train if the cl"),
    "in words and in capitals": (
        ("TrainSet/a/0.png", "TrainSet/b/0.png", "MY-VALIDATION/a/0.png", "MY-VALIDATION/b/0.png"),
        r"or move .*MY-VALIDATION to .*/val, .*TrainSet to .*/train if the classes are a, b"),
    "one of them is train": (
        ("train/a/0.png", "train/b/0.png", "val_set/a/0.png", "val_set/b/0.png"),
        r"or move \S+val_set to \S+/val if the classes are a, b"),
    "only formats that are not read": (("a/0.CR2", "b/0.dng"),
        "no class folders; a, b hold only images in formats that cnnft does not read, to be conv"),
    "loose images of such formats": (("0.jxl",), "; data holds only images in formats that cnnft"),
    "an archive": (("data.zip", "README"), "; data holds only archives, to be unpacked: put the"),
    "hidden images only": ((".0.png", ".x/1.png", "b/x.txt"),
        r"no class folders; b holds no images; 2 hidden image\(s\) need --include-hidden:"),
    "splits in some classes": (
        ("a/train/0.png", "a/val/1.png", "b/0.png"),
        "two ways: a holds train and other splits, b none: give --layout class-split .*flat"),
    "unlabelled train and test": (("train/0.png", "test/0.png"), "no class folders in them"),
    "two of one split": (("train/a/0.png", "Train/b/0.png"), "are both a train folder"),
    "one folder": (("data/train/a/0.png", "data/train/b/0.png", "x.csv"),
        r"one class only \(data\).*; did you mean .*data/data, which holds train\?"),
    "train within train": (("train/train/a/0.png", "train/train/b/0.png"),
        r"one class only \(train\).*; did you mean .*/train/train, which holds a, b\?"),
    "one class and an empty one": (("a/0.png", "b/x.txt"), r"one class only \(a\).*; b holds no i"),
    "images only": (("0.png", "1.png"), r"no class folders; 2 image\(s\) lie beside each other"),
    "a class in val alone": (("train/a/0.png", "train/b/0.png", "val/B/0.png"),
        r"val/B/ is no class of the training data \(a, b\)"),
    "val and no train": (("train/0.png", "val/a/0.png", "val/b/0.png"),
        "has val but no train folder that holds class folders"),
}  # fmt: skip


@pytest.mark.parametrize(("paths", "message"), REFUSED.values(), ids=REFUSED)
def test_what_may_be_two_things_or_is_none_is_refused(
    tmp_path: Path, paths: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CnnftError, match=message):
        read_dataset(make(tmp_path / "data", paths))


def test_a_class_in_test_alone_is_left_out_of_what_is_checked(tmp_path: Path) -> None:
    paths = ("train/a/0.png", "train/b/0.png", "test/a/1.png", "test/unknown/2.png")
    dataset = read_dataset(put(tmp_path, *paths))
    assert classes_of(dataset)["test"] == {"a": 1, "b": 0}
    assert "folder test/unknown/ (no class of the training data" in summary(
        dataset.skipped, dataset.source
    )


def test_hidden_folders_are_read_when_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "a/.x/1.png", "@eaDir/2.png", "a/.2.png", "lost+found/3.png")
    dataset = read_dataset(open_source(tmp_path, include_hidden=True))
    assert classes_of(dataset) == {"train": {"@eaDir": 1, "a": 3, "lost+found": 1}}
    assert dataset.skipped == ()


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((f"train/{NFC}/0.png", "train/tea/1.png", f"val/{NFD}/2.png"), NFC),
        ((f"train/{NFD}/0.png", "train/tea/1.png", f"val/{NFC}/2.png"), NFD),
        ((f"{NFD}/0.png", f"{NFC}/1.png", "tea/2.png"), NFD),
    ],
)
def test_names_that_unicode_composes_otherwise_are_one_class(
    tmp_path: Path, paths: tuple[str, ...], expected: str
) -> None:
    put(tmp_path, *paths)
    if len(list(tmp_path.rglob("caf*"))) < 2:
        pytest.skip("the file system takes the names for the same")
    dataset = read_dataset(tmp_path)
    assert dataset.classes == (expected, "tea")
    assert len(dataset.samples) == 3 and dataset.skipped == ()
    (note,) = dataset.notes
    assert f"holds class {expected}: the names differ only in how Unicode" in note


# ---------------------------------------------------------------- cnnft's own


def test_only_a_run_is_taken_for_one(tmp_path: Path, trained: Path) -> None:
    put(tmp_path, "a/0.png", "b/0.png", "a/notes/config.toml", "a/notes/1.png")
    shutil.copytree(trained, tmp_path / "runs" / "new")
    for name in ("finetune", "feature-extractor"):
        shutil.copytree(OLD / name, tmp_path / "runs" / name)
        assert Run.is_run(OLD / name)
    shutil.copytree(trained, tmp_path / "a" / "inside")
    dataset = read_dataset(tmp_path)
    assert classes_of(dataset) == {"train": {"a": 2, "b": 1}}
    own = {e.path: (e.files, e.images) for e in dataset.skipped if e.reason == OWN}
    assert own == {f"{tmp_path}/runs/": (0, 0), f"{tmp_path}/a/inside/": (0, 0)}
    assert "folders a/inside/, runs/ (cnnft's own)" in summary(dataset.skipped, dataset.source)


def test_images_in_runs_and_beside_them_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "runs/stray.png", "b/mine/1.png", "b/mine/2.png", "b/3.png", "b/4.png")
    for folder in ("runs/one", "b/mine"):
        shutil.copytree(OLD / "finetune", tmp_path / folder, dirs_exist_ok=True)
    dataset = read_dataset(tmp_path)
    assert classes_of(dataset) == {"train": {"a": 1, "b": 2}}
    assert {e.path: e.images for e in dataset.skipped} == {
        f"{tmp_path}/b/mine/": 2, f"{tmp_path}/runs/": 1,
    }  # fmt: skip
    assert not any(entry.is_expected for entry in dataset.skipped)
    assert "(cnnft's own; 3 images)" in summary(dataset.skipped, dataset.source)
    assert image_files(tmp_path / "runs")[0] == [f"{tmp_path}/runs/stray.png"]  # asked for


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"no json", b'{"formats": 1}'])
def test_other_peoples_files_of_these_names_are_no_mark(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "a/x/0.png", "b/0.png", "a/x/config.toml")
    for name in ("formats.json", "config.json"):
        (tmp_path / "a" / "x" / name).write_bytes(content)
    assert classes_of(read_dataset(tmp_path)) == {"train": {"a": 1, "b": 1}}


# ---------------------------------------------------------------- commands


@pytest.fixture
def train(cnnft: Cli, tmp_path: Path) -> Callable[..., Outcome]:
    def run(data: Path, *arguments: object) -> Outcome:
        return cnnft(
            "finetune", data, "--backbone=builtin", "--mode=feature-extractor", "--epochs=1",
            "--workers=0", "--runs-dir", data / "runs", *arguments,
        )  # fmt: skip

    return run


def test_every_command_says_what_is_left_out(cnnft: Cli, train: Cli, flat: Path) -> None:
    draw(flat / "loose.png", 0, 50)
    put(flat, "ants/.x/1.png", "ants/a.txt", "ants/more/b.txt", "nobody/x.txt")
    outcome = train(flat, "--name=one")
    assert outcome.code == 0, outcome.err
    said = (
        "left out: 1 image beside the class folders, 2 files that are no images (2 .txt), "
        "folder ants/.x/ (hidden, or left by the system; 1 image), folder nobody/ (no images)"
    )
    assert f"warning: {said}\n" in outcome.err
    run = Path(outcome.out.strip())
    with (run / "skipped.csv").open(newline="") as file:
        rows = {(r["file"], r["files"], r["images"]) for r in csv.DictReader(file)}
    expected = {
        (f"{flat}/loose.png", "1", "1"), (f"{flat}/ants/*", "2", "0"),
        (f"{flat}/ants/.x/", "1", "1"), (f"{flat}/nobody/", "1", "0"),
    }  # fmt: skip
    assert rows == expected
    assert {(e.path, str(e.files), str(e.images)) for e in Run(run).skipped()} == expected

    again = train(flat, "--name=two")  # beside its own runs
    assert f"{said}, folder runs/ (cnnft's own)\n" in again.err
    outcome = cnnft("evaluate", flat, "-m", run, "--workers=0", "--json")
    assert f"warning: {said}, folder runs/ (cnnft's own)\n" in outcome.err
    assert len(json.loads(outcome.out)["skipped"]) == 5
    text, found = (cnnft("check", flat, "--workers=0", *flags).out for flags in ((), ("--json",)))
    assert f"{flat}/ants/*: has no image suffix (.txt) (2 files, 0 images)" in text
    assert f"{flat}/nobody/: no images (1 file, 0 images)" in text
    assert len(json.loads(found)["skipped"]) == 5
    train(flat, "--strict").fails_with(1, f"{flat}/ants/*: has no image suffix", "(and 3 more)")


def test_a_class_to_convert_is_warned_of(train: Cli, flat: Path) -> None:
    put(flat, "wasps/0.nef")
    assert "warning: left out: folder wasps/ (only images in" in train(flat, "--dry-run").err


def test_strict_bears_what_nobody_misses(train: Cli, flat: Path) -> None:
    put(flat, ".git/x", "ants/.DS_Store", "bees/Thumbs.db")
    shutil.copytree(OLD / "finetune", flat / "runs" / "before")
    outcome = train(flat, "--strict", "--dry-run")
    assert outcome.code == 0 and "left out: folder runs/ (cnnft's own)" in outcome.err


@pytest.mark.parametrize("below", ["x", "x/train", "x/test"])
def test_evaluate_names_the_folder_that_is_meant(
    cnnft: Cli, trained: Path, tmp_path: Path, below: str
) -> None:
    put(tmp_path, f"{below}/ants/0.png", f"{below}/bees/0.png")
    outcome = cnnft("evaluate", tmp_path, "-m", trained, "--workers=0")
    outcome.fails_with(1, f"did you mean {tmp_path}/x, which holds")


def test_hidden_classes_train_and_are_evaluated(cnnft: Cli, train: Cli, flat: Path) -> None:
    (flat / "ants").rename(flat / ".ants")
    train(flat).fails_with(1, "one class only (bees)")
    run = train(flat, "--include-hidden").out.strip()
    outcome = cnnft("evaluate", flat, "-m", run, "--include-hidden", "--workers=0", "--json")
    assert [row["name"] for row in json.loads(outcome.out)["classes"]] == [".ants", "bees"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mode=feature-extractor", "--head-solver=sgd", "--class-weights=balanced"),
        ("--mode=finetune", "--sampling=balanced"),
        ("--mode=finetune", "--class-weights=balanced", "--focal=2", "--label-smoothing=0.1"),
    ],
    ids=lambda flags: flags[0],
)
def test_a_rare_class_is_trained_and_has_no_score(
    cnnft: Cli, train: Cli, flat: Path, flags: tuple[str, ...]
) -> None:
    draw(flat / "wasps" / "only.png", 2, 0)
    shutil.copytree(flat / "ants", flat / "copies")  # every image is another class's
    outcome = train(flat, *flags)
    assert outcome.code == 0, outcome.err
    assert "have no image in val, so they are trained and have no score: wasps" in outcome.err
    run = Path(outcome.out.strip())
    splits = Run(run).dataset().splits
    assert min(splits["train"].counts()) >= 1 and splits["train"].counts()[3] == 1
    assert splits["val"].counts()[3] == 0
    rows = cnnft("evaluate", flat, "-m", run, "--workers=0").out.splitlines()
    row = next(line.split() for line in rows if line.startswith("wasps"))
    assert row[:2] == ["wasps", "0"] and row[3] == "-"
    if "--sampling=balanced" in flags:
        found = json.loads(cnnft("check", flat, "--workers=0", "--json").out)
        assert "wasps" in found["unscored"] and "ants" not in found["unscored"]


def test_a_class_may_be_missing_in_val(train: Cli, cnnft: Cli, separated: Path) -> None:
    shutil.rmtree(separated / "val" / "bees")
    (separated / "val" / "empty").mkdir()
    outcome = train(separated)
    assert outcome.code == 0, outcome.err
    assert "no score: bees" in outcome.err and "folder val/empty/ (no images)" in outcome.err
    found = json.loads(cnnft("check", separated, "--workers=0", "--json").out)
    assert found["unscored"] == ["bees"]


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("link", ["c", "train", "val/c", "v1.5", "a/train"])
def test_a_link_to_nothing_that_may_be_a_class_or_a_split_is_an_error(
    tmp_path: Path, link: str
) -> None:
    put(tmp_path, "val/a/0.png" if "val" in link else "b/0.png", "a/x/0.png")
    (tmp_path / link).symlink_to("nowhere")
    with pytest.raises(CnnftError, match=f"{tmp_path / link} is a link that leads nowhere: repair"):
        read_dataset(tmp_path)


def test_other_links_to_nothing_are_left_out_with_their_reason(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    links = "a/x.2021", "a/more", "b/gone.png"
    for link in links:
        (tmp_path / link).symlink_to("nowhere")
    dataset = read_dataset(tmp_path)
    assert [(e.path, e.reason, e.files, e.images) for e in dataset.skipped] == [
        (str(tmp_path / link), "cannot be read (a link to nothing)", 1, int(link.endswith("png")))
        for link in sorted(links)
    ]
    assert summary(dataset.skipped, dataset.source) == (
        "1 image that cannot be read, 2 files that are no images (2 other)"
    )


# ---------------------------------------------------------------- scanning


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{split}/{name}/deep/{split}.png" for split in ("train", "val")
                    for name in "abc"), "test/0.png")  # fmt: skip
    listed: Counter[str] = Counter()
    scan = Tree._scan

    def counting(tree: Tree, folder: str) -> object:
        listed[folder] += 1
        return scan(tree, folder)

    monkeypatch.setattr(Tree, "_scan", counting)
    read_dataset(tmp_path)
    assert set(listed.values()) == {1} and len(listed) == 1 + 3 + 6 + 6


def test_many_files_that_are_no_images_are_one_entry(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "b/0.png", *(f"a/{n}.{n:06}" for n in range(300)))
    put(tmp_path, *(f"a/{n}.json" for n in range(300)))
    dataset = read_dataset(tmp_path)
    assert sorted((e.reason, e.files, e.images) for e in dataset.skipped) == [
        (UNSUITED, 300, 0), (f"{UNSUITED} (.json)", 300, 0),
    ]  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/0.png", "b/0.png", "c/d/0.png", "lost+found/x")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith(("/d", "/lost+found")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CnnftError, match=r"c/d: cannot be read \(Permission denied\)"):
        read_dataset(tmp_path)
    shutil.move(tmp_path / "c", tmp_path / ".c")
    assert {(e.path, e.files) for e in read_dataset(tmp_path).skipped} == {
        (f"{tmp_path}/.c/", 0), (f"{tmp_path}/lost+found/", 0),
    }  # fmt: skip


def test_runs_of_before_list_their_files_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "skipped.csv").write_text("file,reason\n/data/x.png,is damaged\n")
    assert Run(tmp_path).skipped() == (Skipped("/data/x.png", "is damaged", 1, 1),)
