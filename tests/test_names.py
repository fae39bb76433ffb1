"""A class may have any name that a folder can have."""

import csv
import io
import json
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Outcome, assert_alike, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnnft import finetune, load
from cnnft.cli import console
from cnnft.data.dataset import Samples, Skipped
from cnnft.inference.predictions import Predictions
from cnnft.machine.files import csv_line, read_csv
from cnnft.runs.predictions import predictions_from_csv, predictions_to_csv
from cnnft.runs.records import data_from_csv, data_to_csv, skipped_from_csv, skipped_to_csv
from cnnft.runs.run import Run

Cli = Callable[..., Outcome]

NAMES = (
    *("train", "val", "test", "file", "label", "role", "fold", "sha256", "logit:x", "class", "n"),
    *("0", "10", "2", "1e5", "007", "nan", "inf", "True", "None", "null", "~", "*", "?", "#", "-"),
    *("Ant", "ant", "STRASSE", "straße", " ant", "ant ", "dot.", "it's \"quoted\"", "a,b", "a;b"),
    *("line\nbreak", "carriage\rreturn", "tab\there", "a=b", "=1+1", "[bold]", "{}", "%s", "\\n"),
    *("🐝", "\u202eright to left", "\u200b", "\ufeffmark", "\x1b[31mred", "\x07", "\u2028", "\x85"),
    *("--json", "-q", "x" * 255, unicodedata.normalize("NFD", "café"), "蜂", "$HOME", "`id`"),
)  # fmt: skip


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """(DATA/CLASS with two images each, a run on it)."""
    folder = tmp_path_factory.mktemp("names")
    for label, name in enumerate(NAMES):
        with suppress(OSError):  # a file system that has no such name
            for n in range(2):
                draw(folder / "data" / name / f"{n}.png", label, n, (16, 16))
    run = finetune(
        folder / "data", backbone="builtin", mode="feature-extractor",
        head_solver="sgd", epochs=1, workers=0,
        image_size=32, probe_first=False, runs_dir=folder / "runs", name="named",
    )  # fmt: skip
    return folder / "data", run


def classes_of(data: Path) -> set[str]:
    return {folder.name for folder in data.iterdir()}


def harmless(outcome: Outcome) -> None:
    """One that went well, and gives a terminal no command."""
    assert outcome.code == 0, outcome.err
    for text in (outcome.out, outcome.err):
        assert all(line.isprintable() for line in text.split("\n"))


def test_a_run_knows_its_classes(named: tuple[Path, Run]) -> None:
    data, run = named
    names = classes_of(data)
    assert set(run.description().classes) == set(load(run.path).classes) == names
    assert set(run.dataset().classes) == set(run.predictions().samples.classes) == names
    for samples in run.dataset().splits.values():
        for path, label in zip(samples.paths, samples.labels, strict=True):
            assert Path(path).parent.name == samples.classes[label]


def test_evaluate_shows_every_class(cnnft: Cli, named: tuple[Path, Run]) -> None:
    data, run = named
    outcome = cnnft("evaluate", data, "-m", run.path)
    harmless(outcome)
    rows = {
        line[: line.rindex(" 1 ")].rstrip() for line in outcome.out.splitlines() if " 1 " in line
    }
    assert {console.printable(name).rstrip() for name in classes_of(data) if len(name) < 99} <= rows
    outcome = cnnft("evaluate", data, "-m", run.path, "--json")
    found = json.loads(outcome.out)
    assert [row["name"] for row in found["classes"]] == list(run.description().classes)
    assert found["n"] == len(classes_of(data)) == len(found["confusion"])


def test_predict_writes_every_name_whole(
    cnnft: Cli, named: tuple[Path, Run], tmp_path: Path
) -> None:
    data, run = named
    count = len(classes_of(data))
    image = next(data.glob("train/*.png"))
    harmless(cnnft("predict", image, "-m", run.path, "--top", count))
    for form in ("csv", "json", "jsonl"):
        file = tmp_path / f"all.{form}"
        assert cnnft("predict", data, "-m", run.path, "--top", count, "--output", file).code == 0
        with file.open(newline="", encoding="utf-8") as text:
            if form == "csv":
                rows = list(csv.DictReader(text))
                labels = ["label", *(f"label_{rank}" for rank in range(2, count + 1))]
                found = [[row["file"], *(row[label] for label in labels)] for row in rows]
            else:
                parsed = json.load(text) if form == "json" else map(json.loads, text)
                found = [[row["file"], *(top["class"] for top in row["top"])] for row in parsed]
        assert {Path(file) for file, *_ in found} == set(data.glob("*/*.png"))
        assert all(set(top) == classes_of(data) for _, *top in found)


def test_on_a_terminal_the_same_text_is_harmless(
    named: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for printed in (console.result, console.result_text):
        monkeypatch.setattr("sys.stdout", Terminal())
        printed("a\x1b[31mred\nb")
        assert console.sys.stdout.getvalue().rstrip("\n") == "a\\x1b[31mred\nb"


def test_check_diff_and_exports_take_any_name(
    cnnft: Cli, named: tuple[Path, Run], tmp_path: Path
) -> None:
    data, run = named
    sheet = tmp_path / "sheet.png"
    harmless(cnnft("check", data, "--show-augment", sheet))
    assert Image.open(sheet).size[1] > 0
    harmless(cnnft("diff", run.path, run.path))
    outcome = cnnft("check", data, "--json")
    assert json.loads(outcome.out)["counts"]["train"] == dict.fromkeys(classes_of(data), 2)
    image = next(data.glob("val/*.png"))
    told = json.loads(cnnft("predict", image, "-m", run.path, "--json", "--top", 99).out)
    for form in ("head", "safetensors"):
        harmless(cnnft("export", run.path, "--format", form, "--output", tmp_path / form))
        outcome = cnnft("predict", image, "-m", tmp_path / form, "--json", "--top", 99)
        assert_alike(json.loads(outcome.out), told)


@pytest.mark.slow
def test_a_student_of_many_names_in_all_that_is_written(
    cnnft: Cli, named: tuple[Path, Run], tmp_path: Path
) -> None:
    """Finetune mode with a teacher, in train and val folders; resumed; TensorBoard, plots, ONNX."""
    data, teacher = named
    for path in data.glob("*/*.png"):
        split = "train" if path.stem == "0" else "val"
        to = tmp_path / "splits" / split / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    outcome = cnnft(
        "finetune", tmp_path / "splits", "--backbone=builtin", "--epochs=1", "--workers=0",
        "--image-size=32", "--teacher", teacher.path, "--class-weights=balanced", "--tensorboard",
        "--plot-schedule", tmp_path / "plot.svg", "--runs-dir", tmp_path / "runs", "--name=student",
    )  # fmt: skip
    harmless(outcome)
    run = Run.open(tmp_path / "runs" / "student")
    assert set(run.description().classes) == classes_of(data)
    harmless(cnnft("finetune", "--resume", run.path, "--epochs", 2))
    harmless(cnnft("diff", run.path, teacher.path))
    harmless(cnnft("evaluate", tmp_path / "splits", "-m", run.path))
    pytest.importorskip("onnxruntime")
    harmless(cnnft("export", run.path, "--format", "onnx"))


# ---------------------------------------------------------------- readers and writers


anything = st.text(
    st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=9
) | st.sampled_from(NAMES)
paths = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=9).filter(
    lambda text: _is_a_file_name(text)
)


def _is_a_file_name(text: str) -> bool:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeEncodeError:
        return False


@st.composite
def sorted_samples(draw: st.DrawFn) -> Samples:
    """Of two to five classes, at least one image of each."""
    classes = tuple(sorted(draw(st.sets(anything, min_size=2, max_size=5))))
    labels = sorted([*range(len(classes)), *draw(st.lists(st.integers(0, 1), max_size=3))])
    files = draw(st.lists(paths, min_size=len(labels), max_size=len(labels)))
    hashes = tuple(f"{n:064x}" for n in range(len(labels)))
    return Samples(tuple(files), tuple(labels), classes, hashes)


@settings(max_examples=50)
@given(sorted_samples())
def test_tables_of_a_run_read_back_whatever_the_names(samples: Samples) -> None:
    splits = {"train": samples, "val": samples.take([0])}
    assert data_from_csv(io.BytesIO(data_to_csv(splits))) == splits
    logits = torch.randn(len(samples), len(samples.classes))
    read = predictions_from_csv(io.BytesIO(predictions_to_csv(Predictions(samples, logits, "val"))))
    assert read.samples == samples and torch.equal(read.logits, logits)
    skipped = tuple(
        Skipped(path, name) for path, name in zip(samples.paths, samples.classes, strict=False)
    )
    assert skipped_from_csv(io.BytesIO(skipped_to_csv(skipped))) == skipped


@given(st.lists(anything, min_size=1, max_size=4))
def test_a_line_of_csv_reads_back_here_and_elsewhere(cells: list[str]) -> None:
    line = csv_line(cells)
    assert next(csv.reader(io.StringIO(line, newline=""))) == cells
    assert next(read_csv(io.BytesIO(line.encode()))) == cells
