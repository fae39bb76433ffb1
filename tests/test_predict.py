"""cnnft predict: what goes in, in which order, and what comes out in which form."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, draw, draw_folder
from PIL import Image

from cnnft import load
from cnnft.cli import rows
from cnnft.config.texts import VIEWS, view_count
from cnnft.data import loading as batches
from cnnft.data.images import read_image
from cnnft.data.viewsets import ViewSet
from cnnft.inference.predict import Inference

Cli = Callable[..., Outcome]
Row = dict[str, Any]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images and one broken one in the middle; nested, sorted as 0 1 2 3 4 5 sub/6."""
    folder = tmp_path / "images"
    for n in (0, 1, 2, 4, 5):
        draw(folder / f"{n}.png", n % 2, 50 + n, size=(40 + 9 * n, 32))
    (folder / "3.png").write_bytes(b"no image")
    draw(folder / "sub" / "6.png", 0, 56)
    return folder


@pytest.fixture
def predict(cnnft: Cli, trained: Path) -> Callable[..., list[Row]]:
    """The rows of `cnnft predict ... --json`."""

    def run(*arguments: object, code: int = 0) -> list[Row]:
        workers = [] if "--workers" in arguments else ["--workers", 0]
        outcome = cnnft("predict", *arguments, "-m", trained, "--json", *workers)
        assert outcome.code == code, outcome.err
        return json.loads(outcome.out)

    return run


Predict = Callable[..., list[Row]]


def probabilities(row: Row) -> dict[str, float]:
    return {entry["class"]: entry["probability"] for entry in row["top"]}


def names(rows: list[Row]) -> list[str]:
    return [Path(row["file"]).name for row in rows]


# ---------------------------------------------------------------- forms of output


def test_all_forms_say_the_same(cnnft: Cli, predict: Predict, trained: Path, images: Path) -> None:
    rows = predict(images, "--top", 2)

    def output(form: str) -> str:
        outcome = cnnft("predict", images, "-m", trained, "--top", 2, "--format", form)
        assert outcome.code == 0
        assert "1 of 7 files could not be read" in outcome.err
        return outcome.out

    assert json.loads(output("json")) == rows
    assert [json.loads(line) for line in output("jsonl").splitlines()] == rows

    table = list(csv.DictReader(io.StringIO(output("csv"), newline="")))
    columns = ["file", "label", "probability", "label_2", "probability_2", "error"]
    assert [list(line) for line in table] == [columns] * len(rows)
    for line, row in zip(table, rows, strict=True):
        cells = [line["label"], line["probability"], line["label_2"], line["probability_2"]]
        expected = [value for entry in row["top"] for value in entry.values()]
        assert cells == (list(map(str, expected)) or [""] * 4)
        assert (line["file"], line["error"]) == (row["file"], row["error"] or "")

    header, *lines = output("table").splitlines()
    assert header.split()[:3] == ["file", "class", "probability"]
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["file"])
        if row["error"]:
            assert line.split(maxsplit=1)[1].strip() == row["error"]
        else:
            cells = [x for name, p in probabilities(row).items() for x in (name, f"{p:.1%}")]
            assert line.split()[1:] == cells


def test_a_row_holds_label_probability_and_error(predict: Predict, images: Path) -> None:
    for row in predict(images):
        assert list(row) == ["file", "label", "probability", "top", "error"]
        if names([row]) == ["3.png"]:
            assert (row["label"], row["probability"], row["top"]) == (None, None, [])
            assert "not an image" in row["error"]
        else:
            assert row["error"] is None
            assert row["top"] == [{"class": row["label"], "probability": row["probability"]}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".CSV"])
def test_output_takes_its_form_from_the_suffix(
    cnnft: Cli, trained: Path, images: Path, suffix: str
) -> None:
    path = images.parent / "new folder" / f"out{suffix}"
    wanted = cnnft("predict", images, "-m", trained, "--format", suffix[1:].lower())
    outcome = cnnft("predict", images, "-m", trained, "--output", path)
    assert outcome.code == 0 and outcome.out == ""
    assert path.read_text() == wanted.out
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_format_wins_over_the_suffix(cnnft: Cli, trained: Path, images: Path) -> None:
    path = images.parent / "out.csv"
    cnnft("predict", images, "-m", trained, "--output", path, "--format", "json")
    assert len(json.loads(path.read_text())) == 7


def test_output_that_cannot_be_written(cnnft: Cli, trained: Path, images: Path) -> None:
    blocked = images / "0.png" / "out.csv"  # below a file
    before = (images / "0.png").read_bytes()
    outcome = cnnft("predict", images, "-m", trained, "--output", blocked)
    outcome.fails_with(1, str(blocked), "cannot be written")
    assert (images / "0.png").read_bytes() == before
    cnnft("predict", images, "-m", trained, "--output", images, "--format", "csv").fails_with(
        2, str(images), "is a folder"
    )


ODD_NAMES = [
    "two words.png", "comma, and.png", 'quote"s.png', "apostrophe's.png", "line\nbreak.png",
    "return\rhere.png", "tab\there.png", "ünïcødé 蜂 🐝.png", "semi;colon.png", "[red]tag.png",
    "-dash.png", "back\\slash.png", "{brace}.png",
]  # fmt: skip


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_odd_names_survive(cnnft: Cli, trained: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "odd, 'folder'"
    for n, name in enumerate(ODD_NAMES):
        draw(folder / name, n % 2, n)
    output = tmp_path / f"out.{form}"
    shown = cnnft("predict", folder, "-m", trained, "--format", form)
    written = cnnft("predict", folder, "-m", trained, "--output", output)
    assert shown.code == written.code == 0
    for text in (shown.out, output.read_bytes().decode()):
        if form == "csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        elif form == "json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
        assert [row["file"] for row in rows] == [str(folder / name) for name in sorted(ODD_NAMES)]
        assert {row["label"] for row in rows} <= {"ants", "bees"}


def test_a_file_name_of_any_bytes_is_predicted(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    folder = tmp_path / "bytes"
    draw(folder / "x.png", 0, 0)
    try:
        (folder / "x.png").rename(folder / name)
    except OSError:
        return  # a file system of Unicode names has no such file
    output = tmp_path / "out.csv"
    assert cnnft("predict", folder, "-m", trained, "--output", output).code == 0
    assert b"caf\xe9.png," in output.read_bytes()
    shown = cnnft("predict", folder, "-m", trained, "--json")
    assert json.loads(shown.out)[0]["file"] == str(folder / name)


# ---------------------------------------------------------------- which files, in which order


def test_files_folders_and_patterns_come_in_the_order_given(predict: Predict, images: Path) -> None:
    assert names(predict(images)) == [
        "0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "6.png",
    ]  # fmt: skip
    one, two = images / "5.png", images / "sub"
    assert names(predict(one, two, images / "[01].png")) == ["5.png", "6.png", "0.png", "1.png"]
    assert names(predict(one, one)) == ["5.png", "5.png"]
    assert names(predict(images / "**" / "6.*")) == ["6.png"]


def test_a_quoted_pattern_means_what_the_shell_would_make_of_it(
    predict: Predict, images: Path
) -> None:
    expanded = sorted(images.iterdir())
    assert predict(images / "*") == predict(*expanded)


def test_a_file_named_like_a_pattern_is_that_file(predict: Predict, images: Path) -> None:
    odd = images / "[01].png"
    shutil.copy(images / "4.png", odd)
    assert names(predict(odd)) == ["[01].png"]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (32, 0), (1, 1), (3, 1)])
def test_an_unreadable_file_shifts_nobody(
    predict: Predict, images: Path, trained: Path, batch_size: int, workers: int
) -> None:
    (images / "0.png").rename(images / "00.png")
    (images / "0.png").touch()  # also the very first
    rows = predict(images, "--top", 2, "--batch-size", batch_size, "--workers", workers)
    assert names(rows) == [
        "0.png", "00.png", "1.png", "2.png", "3.png", "4.png", "5.png", "6.png",
    ]  # fmt: skip
    assert [name for name, row in zip(names(rows), rows, strict=True) if row["error"]] == [
        "0.png", "3.png",
    ]  # fmt: skip
    classifier = load(trained)
    for row in rows:
        (alone,) = classifier.predict([row["file"]])
        assert row["error"] == alone.error
        assert probabilities(row) == pytest.approx(dict(alone.top), abs=1e-5)
    assert len({row["probability"] for row in rows}) == 7, "the images must tell rows apart"


def test_rows_in_reverse_are_the_same_rows(predict: Predict, images: Path) -> None:
    files = sorted(images.glob("*.png"))
    forward, backward = predict(*files), predict(*reversed(files))
    for one, other in zip(forward, reversed(backward), strict=True):
        assert one["file"] == other["file"] and one["label"] == other["label"]
        assert probabilities(one) == pytest.approx(probabilities(other), abs=1e-5)


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize(("top", "shown"), [(1, 1), (2, 2), (9, 2)])
def test_top_k_falls_and_all_classes_sum_to_one(
    predict: Predict, images: Path, top: int, shown: int
) -> None:
    for row in predict(*images.glob("[0124].png"), "--top", top):
        found = [entry["probability"] for entry in row["top"]]
        assert len(found) == shown and found == sorted(found, reverse=True)
        assert row["label"] == row["top"][0]["class"]
        if shown == 2:
            assert sum(found) == pytest.approx(1, abs=1e-6)
            assert probabilities(row).keys() == {"ants", "bees"}


def test_probabilities_are_those_of_the_network(
    predict: Predict, images: Path, trained: Path
) -> None:
    classifier = load(trained)
    for row in predict(*images.glob("[0124].png"), "--top", 2):
        pixels = classifier.preprocess(read_image(row["file"]))
        expected = classifier.forward(pixels[None])[0].softmax(dim=0).tolist()
        found = [probabilities(row)[name] for name in classifier.classes]
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_classifier_has_learned_the_stripes(predict: Predict, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "new", ("ants", "bees"), 10, first_seed=700)
    rows = predict(folder)
    assert sum(Path(row["file"]).parent.name == row["label"] for row in rows) >= 18


# ---------------------------------------------------------------- test-time augmentation


@pytest.mark.parametrize("tta", [*VIEWS, "random:3"])
def test_tta_is_the_mean_probability_over_the_views(
    predict: Predict, images: Path, trained: Path, tta: str
) -> None:
    classifier = load(trained)
    rows = predict(images, "--tta", tta, "--top", 2, "--batch-size", 2)
    assert [row["error"] is not None for row in rows] == [n == 3 for n in range(7)]
    for row in rows:
        if row["error"]:
            continue
        views = ViewSet(classifier.input_spec, tta)(read_image(row["file"]))
        assert len(views) == view_count(tta)
        with torch.inference_mode():
            each = [classifier.forward(view[None])[0].softmax(dim=0) for view in views]
        mean = torch.stack(each).double().mean(dim=0).tolist()
        found = [probabilities(row)[name] for name in classifier.classes]
        assert found == pytest.approx(mean, abs=1e-5)
        assert sum(found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("tta", "symmetric"), [("hflip", True), ("ten-crop", True), ("none", False)]
)
def test_mirrored_images_predict_alike_with_flips(
    predict: Predict, tmp_path: Path, tta: str, symmetric: bool
) -> None:
    straight = draw(tmp_path / "straight.png", 1, 7, size=(64, 64))
    mirrored = tmp_path / "mirrored.png"
    Image.open(straight).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    one, other = (
        probabilities(row)["ants"] for row in predict(straight, mirrored, "--tta", tta, "--top", 2)
    )
    assert (one == pytest.approx(other, abs=1e-6)) == symmetric


def test_one_path_is_as_good_as_a_list(trained: Path, images: Path) -> None:
    classifier = load(trained, device="cpu")
    assert classifier.predict(str(images / "0.png")) == classifier.predict([images / "0.png"])


# ---------------------------------------------------------------- how it is computed


def test_batch_size_auto_and_sixteen_bits(predict: Predict, images: Path) -> None:
    expected = predict(images, "--top", 2)
    assert predict(images, "--top", 2, "--batch-size", "auto") == expected
    rows = predict(images, "--top", 2, "--precision", "bfloat16")
    assert rows != expected
    for row, exact in zip(rows, expected, strict=True):
        assert probabilities(row) == pytest.approx(probabilities(exact), abs=0.02)


@pytest.mark.parametrize(
    ("device", "tta", "images"),
    [("cpu", "none", 32), ("cpu", "ten-crop", 3), ("cuda", "none", 256)],
)
def test_batch_size_auto_counts_views(device: str, tta: str, images: int) -> None:
    chosen = Inference(tta, batch_size="auto", workers=2).loading(torch.device(device), 1000)
    assert (chosen.batch_size, chosen.workers) == (images, 2)


def test_rows_are_written_while_the_images_are_read(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cnnft: Cli
) -> None:
    """Of many images no more than some batches are in memory."""
    folder = draw_folder(tmp_path / "many", ("ants",), 12)
    order: list[str] = []
    read, write = batches.read_image, rows._record

    def reading(*arguments: Any) -> Any:
        order.append("read")
        return read(*arguments)

    def writing(*arguments: Any) -> Row:
        order.append("written")
        return write(*arguments)

    monkeypatch.setattr(batches, "read_image", reading)
    monkeypatch.setattr(rows, "_record", writing)
    arguments = (folder, "-m", trained, "--workers=0", "--batch-size=2", "--format=jsonl")
    assert cnnft("predict", *arguments).code == 0
    assert order.count("read") == order.count("written") == 12
    assert order.index("written") == 4  # the batch before is read when the next one is begun


def test_a_long_table_comes_in_parts(
    cnnft: Cli, trained: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_ROWS", 3)
    shown = cnnft("predict", images, "-m", trained, "--workers=0").out.splitlines()
    assert [line.split()[0] == "file" for line in shown] == [n % 4 == 0 for n in range(len(shown))]
    assert len(shown) == 7 + 3


def test_an_output_that_is_not_finished_is_none(
    cnnft: Cli, trained: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "_record", stop)
    output = images.parent / "outputs" / "out.jsonl"
    outcome = cnnft("predict", images, "-m", trained, "--workers=0", "--output", output)
    assert outcome.code == 130 and not list(output.parent.iterdir())
