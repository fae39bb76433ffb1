"""cnnft evaluate: the numbers, whom they are of, and what is left out."""

import csv
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, assert_alike, draw, draw_folder

from cnnft import finetune
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]
Evaluate = Callable[..., dict[str, Any]]

SIX = ("ants", "bees", "crabs", "doves", "eels", "foxes")


@pytest.fixture
def evaluate(cnnft: Cli, trained: Path) -> Evaluate:
    """The document of `cnnft evaluate DATA -m trained --json`; a later -m wins."""

    def run(*arguments: object) -> dict[str, Any]:
        outcome = cnnft("evaluate", "-m", trained, "--json", "--workers", 0, *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    """DATA/<class>/*: 7 ants and 5 bees, some in the wrong folder, none ever trained on."""
    folder = draw_folder(tmp_path / "unseen", ("ants", "bees"), 4, first_seed=300)
    for n in range(3):
        draw(folder / "ants" / f"in truth a bee {n}.png", 1, 400 + n)
    draw(folder / "bees" / "in truth an ant.png", 0, 500)
    return folder


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A poor run on six classes, from random weights; its data beside it."""
    folder = tmp_path_factory.mktemp("six")
    data = draw_folder(folder / "data", SIX, 3)
    return finetune(
        data, backbone="test_resnet", pretrained=False, mode="feature-extractor",
        head_solver="sgd", epochs=1, seed=1,
        workers=0, runs_dir=folder, name="run",
    ).path  # fmt: skip


def by_class(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["classes"]}


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("data", "tta"), [("unseen", "none"), ("unseen", "hflip"), ("six", "none")]
)
def test_numbers_agree_with_predict(
    cnnft: Cli, trained: Path, request: pytest.FixtureRequest, data: str, tta: str, tmp_path: Path
) -> None:
    if data == "six":
        model = request.getfixturevalue("six")
        folder, classes = draw_folder(tmp_path / "new", SIX, 2, first_seed=50), SIX
    else:
        model, folder, classes = trained, request.getfixturevalue("unseen"), ("ants", "bees")
    common = ["-m", model, "--tta", tta, "--workers", 0, "--json"]
    rows = json.loads(cnnft("predict", folder, "--top", 9, *common).out)
    found = json.loads(cnnft("evaluate", folder, "--batch-size", 5, *common).out)

    truth = [Path(row["file"]).parent.name for row in rows]
    said = [row["label"] for row in rows]
    pairs = Counter(zip(truth, said, strict=True))
    correct = sum(pairs[name, name] for name in classes)
    assert 0 < correct < len(rows), "neither all right nor all wrong proves anything"
    assert (found["n"], found["correct"]) == (len(rows), correct)
    assert found["accuracy"] == pytest.approx(correct / len(rows))
    assert found["chance"] == pytest.approx(max(Counter(truth).values()) / len(rows))
    low, high = found["interval95"]
    assert 0 <= low < found["accuracy"] < high <= 1
    assert found["confusion"] == [[pairs[t, s] for s in classes] for t in classes]

    each = [
        {entry["class"]: entry["probability"] for entry in row["top"]}[t]
        for row, t in zip(rows, truth, strict=True)
    ]
    assert found["loss"] == pytest.approx(-sum(map(math.log, each)) / len(each), rel=1e-4)

    assert [row["name"] for row in found["classes"]] == list(classes)
    for name, row in by_class(found).items():
        hits, true, predicted = pairs[name, name], truth.count(name), said.count(name)
        assert row["n"] == true
        expected = {
            "precision": share(hits, predicted),
            "recall": share(hits, true),
            "f1": share(2 * hits, true + predicted),
        }
        for measure, value in expected.items():
            assert (row[measure] is None) == (value is None), (name, measure)
            assert value is None or row[measure] == pytest.approx(value)

    rows_there = [row for row in found["classes"] if row["n"]]
    assert found["macro"] == {
        measure: pytest.approx(sum(row[measure] or 0 for row in rows_there) / len(rows_there))
        for measure in ("precision", "recall", "f1")
    }
    bins: dict[int, list[float]] = {}
    for row, label, name in zip(rows, said, truth, strict=True):
        confidence = row["top"][0]["probability"]
        bins.setdefault(int(confidence * 15), []).append((label == name) - confidence)
    expected_error = sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows)
    assert found["calibration_error"] == pytest.approx(expected_error, abs=1e-5)

    if len(classes) > 5:
        five = [t in [entry["class"] for entry in row["top"][:5]]
                for t, row in zip(truth, rows, strict=True)]  # fmt: skip
        assert found["top5"] == pytest.approx(sum(five) / len(five))
        assert found["top5"] < 1, "choose images on which top-5 errs"
    else:
        assert found["top5"] is None


def test_text_and_json_agree(cnnft: Cli, evaluate: Evaluate, trained: Path, unseen: Path) -> None:
    found = evaluate(unseen)
    lines = cnnft("evaluate", unseen, "-m", trained).out.splitlines()
    low, high = found["interval95"]
    assert lines[0].split("  (")[0].split() == ["top-1", "accuracy", f"{found['accuracy']:.1%}"]
    assert f"95% interval {low:.1%} to {high:.1%}, n = 12" in lines[0]
    assert f"majority-class baseline {7 / 12:.1%}" in lines[0]
    rows = [line.split() for line in lines]
    for name, row in by_class(found).items():
        measures = [f"{row[measure]:.1%}" for measure in ("precision", "recall", "f1")]
        assert [name, str(row["n"]), *measures] in rows
    start = next(i for i, line in enumerate(lines) if line.startswith("confusion matrix"))
    assert rows[start + 1] == ["ants", "bees"]
    assert [row[1:] for row in rows[start + 2 : start + 4]] == [
        [str(count) for count in counts] for counts in found["confusion"]
    ]
    assert not any(line.startswith("top-5") for line in lines)
    macro = {f"{name} {value:.1%}" for name, value in found["macro"].items()}
    assert {part.lower() for part in lines[1].split("   ")[1].split(" (")[0].split(", ")} == macro
    assert f"{found['calibration_error']:.1%} expected calibration error" in lines[3]


def test_top_5_is_told_of_six_classes(cnnft: Cli, six: Path) -> None:
    out = cnnft("evaluate", six.parent / "data", "-m", six, "--workers", 0).out
    assert any(line.startswith("top-5 accuracy") for line in out.splitlines())


def test_class_measures_and_confusion_agree(evaluate: Evaluate, unseen: Path) -> None:
    found = evaluate(unseen)
    matrix = found["confusion"]
    for i, row in enumerate(found["classes"]):
        assert row["n"] == sum(matrix[i])
        assert row["recall"] == pytest.approx(matrix[i][i] / sum(matrix[i]))
        assert row["precision"] == pytest.approx(matrix[i][i] / sum(m[i] for m in matrix))
    assert found["correct"] == sum(matrix[i][i] for i in range(len(matrix)))


# ---------------------------------------------------------------- whom the numbers are of


def test_training_images_are_left_out_and_val_images_are_owned_up_to(
    cnnft: Cli, evaluate: Evaluate, trained: Path
) -> None:
    data = trained.parents[1] / "data"
    found = evaluate(data)
    assert (found["n"], found["left_out"], found["selected_on_val"]) == (4, 16, 4)
    metrics = json.loads((trained / "metrics.json").read_text())["val"]
    assert (found["correct"], found["n"]) == (metrics["correct"], metrics["n"])
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    out = cnnft("evaluate", data, "-m", trained).out
    assert "16 images that the model was trained on" in out
    assert "selected on val 4 of these images" in out and "optimistic" in out


def test_training_images_are_known_by_content(
    evaluate: Evaluate, trained: Path, unseen: Path
) -> None:
    assert evaluate(unseen)["left_out"] == 0
    with (trained / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for split, count in (("train", 3), ("val", 2)):
        for n, row in enumerate([row for row in rows if row["split"] == split][:count]):
            shutil.copy(row["file"], unseen / "bees" / f"copy {split} {n}.png")
    found = evaluate(unseen)
    assert (found["n"], found["left_out"], found["selected_on_val"]) == (14, 3, 2)


def test_copies_and_contradictions_are_told(
    cnnft: Cli, evaluate: Evaluate, trained: Path, unseen: Path
) -> None:
    shutil.copy(unseen / "bees" / "0.png", unseen / "bees" / "again.png")
    shutil.copy(unseen / "bees" / "1.png", unseen / "ants" / "a bee.png")
    assert (evaluate(unseen)["n"], evaluate(unseen)["copies"]) == (14, 2)
    err = cnnft("evaluate", unseen, "-m", trained).err
    assert "1 image(s) lie under two classes" in err and "a bee.png" in err
    assert "2 image(s) are copies of others" in err


def test_contradictions_that_are_left_out_are_not_told(
    cnnft: Cli, trained: Path, unseen: Path
) -> None:
    train = Run(trained).dataset().splits["train"].paths[0]
    for name in ("ants", "bees"):
        shutil.copy(train, unseen / name / "seen.png")
    outcome = cnnft("evaluate", unseen, "-m", trained)
    assert "2 images that the model was trained on" in outcome.out
    assert "under two classes" not in outcome.err


def test_unseen_images_are_not_called_optimistic(cnnft: Cli, trained: Path, unseen: Path) -> None:
    out = cnnft("evaluate", unseen, "-m", trained).out
    assert "selected on" not in out and "left out" not in out


def test_nothing_remains_when_all_was_trained_on(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    with (trained / "data.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "train":
                folder = tmp_path / "again" / row["class"]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(row["file"], folder)
    outcome = cnnft("evaluate", tmp_path / "again", "-m", trained)
    outcome.fails_with(1, "all 16 images", "were trained on")


def test_an_exported_file_does_not_know_what_it_was_trained_on(
    cnnft: Cli, evaluate: Evaluate, trained: Path, tmp_path: Path, unseen: Path
) -> None:
    file = tmp_path / "model.safetensors"
    assert cnnft("export", trained, "--format", "safetensors", "--output", file).code == 0
    outcome = cnnft("evaluate", unseen, "-m", file, "--json", "--workers", 0)
    assert outcome.err.startswith("warning: ") and "no image is left out" in outcome.err
    unknown = {"left_out": None, "selected_on_val": None}
    unknown["calibration"] = None  # the temperature is in its weights
    assert_alike(json.loads(outcome.out), evaluate(unseen) | unknown)


def test_unreadable_images_are_told_and_not_counted(
    cnnft: Cli, trained: Path, unseen: Path
) -> None:
    broken = unseen / "ants" / "broken.png"
    broken.write_bytes(b"no image")
    outcome = cnnft("evaluate", unseen, "-m", trained, "--json")
    found = json.loads(outcome.out)
    assert found["n"] == 12
    assert [entry["file"] for entry in found["skipped"]] == [str(broken)]
    assert f"warning: skipped {broken}: {found['skipped'][0]['reason']}" in outcome.err


# ---------------------------------------------------------------- parts of a folder


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """DATA with 2 train, 3 val and 4 test images per class."""
    data = tmp_path / "parts"
    for seed, (split, count) in enumerate((("train", 2), ("val", 3), ("test", 4))):
        draw_folder(data / split, ("ants", "bees"), count, first_seed=600 + 10 * seed)
    return data


@pytest.mark.parametrize(
    ("flags", "n"),
    [((), 6), (("--split=val",), 6), (("--split=test",), 8), (("--split=all",), 18)],
)
def test_split_chooses_the_part(
    evaluate: Evaluate, parts: Path, flags: tuple[str, ...], n: int
) -> None:
    assert evaluate(parts, *flags)["n"] == n


@pytest.mark.parametrize("split", ["val", "all"])
def test_a_flat_folder_is_one_part(evaluate: Evaluate, unseen: Path, split: str) -> None:
    assert evaluate(unseen, "--split", split)["n"] == 12


def test_valid_serves_as_val(evaluate: Evaluate, parts: Path) -> None:
    (parts / "val").rename(parts / "valid")
    assert evaluate(parts)["n"] == 6


def test_a_part_that_is_missing_names_those_that_are_there(
    cnnft: Cli, trained: Path, parts: Path
) -> None:
    shutil.rmtree(parts / "test")
    cnnft("evaluate", parts, "-m", trained, "--split", "test").fails_with(
        2, "no test folder", "train, val"
    )


def test_without_a_val_folder_val_is_what_was_held_out_of_train(
    evaluate: Evaluate, trained: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(trained.parents[1] / "data", data / "train")
    told = evaluate(data)
    assert (told["n"], told["left_out"], told["selected_on_val"]) == (4, 16, 4)


# ---------------------------------------------------------------- class folders


def test_class_folders_match_by_name_not_by_position(evaluate: Evaluate, unseen: Path) -> None:
    both = evaluate(unseen)
    shutil.rmtree(unseen / "ants")  # bees are now the first and only folder
    bees = evaluate(unseen)
    assert bees["confusion"] == [[0, 0], both["confusion"][1]]
    assert by_class(bees)["ants"]["n"] == 0 and by_class(bees)["ants"]["recall"] is None
    assert by_class(bees)["bees"]["recall"] == by_class(both)["bees"]["recall"]
    assert bees["chance"] == 1


def test_an_empty_class_folder_is_a_class_without_images(
    cnnft: Cli, evaluate: Evaluate, trained: Path, unseen: Path
) -> None:
    both = evaluate(unseen)
    for path in (unseen / "ants").iterdir():
        path.unlink()
    assert evaluate(unseen)["confusion"] == [[0, 0], both["confusion"][1]]
    row = next(
        line.split()
        for line in cnnft("evaluate", unseen, "-m", trained).out.splitlines()
        if line.startswith("ants")
    )
    assert row[:2] == ["ants", "0"] and row[3] == "-"


def test_a_folder_of_no_known_class_is_refused(cnnft: Cli, trained: Path, unseen: Path) -> None:
    (unseen / "ants").rename(unseen / "Ants")
    cnnft("evaluate", unseen, "-m", trained).fails_with(1, "Ants", "ants, bees")


def test_a_folder_without_any_image_is_refused(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "ants").mkdir(parents=True)
    cnnft("evaluate", tmp_path / "empty", "-m", trained).fails_with(1, "ants holds no images")


# ---------------------------------------------------------------- test-time augmentation


def test_all_view_sets_are_compared_on_the_same_images(
    cnnft: Cli, trained: Path, unseen: Path
) -> None:
    common = ["-m", trained, "--workers", 0, "--json"]
    found = json.loads(cnnft("evaluate", unseen, "--tta", "all", *common).out)
    sets = {row["tta"]: row for row in found["view_sets"]}
    assert [row["views"] for row in sets.values()] == [1, 2, 5, 10, 50, 10]
    for name in ("none", "hflip", "random:10"):
        alone = json.loads(cnnft("evaluate", unseen, "--tta", name, *common).out)
        assert sets[name]["accuracy"] == alone["accuracy"]
        assert sets[name]["loss"] == pytest.approx(alone["loss"])
        assert sets[name]["calibration_error"] == pytest.approx(alone["calibration_error"])
    for row in sets.values():
        low, high = row["difference95"]
        assert low <= row["accuracy"] - sets["none"]["accuracy"] <= high
    shown = cnnft("evaluate", unseen, "--tta", "all", *common[:-1]).out
    assert "multiscale" in shown and "difference" in shown


def test_an_unknown_view_set(cnnft: Cli, trained: Path, unseen: Path) -> None:
    cnnft("evaluate", unseen, "-m", trained, "--tta", "everything").fails_with(
        2, "--tta 'everything'", "random:K"
    )
