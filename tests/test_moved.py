"""A run whose images, or which itself, lies elsewhere now; and one whose images are gone."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, draw, draw_folder
from test_resume import finish, same, settings

from cnnft.runs.directory import _replacing
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.training.events import Started, Stopped
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone

Cli = Callable[..., Outcome]


def begin(data: Path, runs: Path, name: str) -> Run:
    """A run that is stopped in its second epoch."""
    taken: list[StepDone] = []
    config = settings(data, runs.parent, name).replace(runs_dir=runs, epochs=2)
    for event in run_plan(prepare(config), stop=lambda: len(taken) > 4):
        if isinstance(event, StepDone):
            taken.append(event)
    assert isinstance(event, Stopped)
    return event.run


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Run]:
    """(a folder of photos/ and runs/begun, for each test to copy; what its ends must be like)."""
    folder = tmp_path_factory.mktemp("origin")
    photos = draw_folder(folder / "photos", ("ants", "bees"), 10)
    shutil.copy(photos / "ants" / "3.png", photos / "ants" / "copy.png")
    whole = finish(settings(photos, folder, "whole").replace(runs_dir=folder / "other", epochs=2))
    return folder, begin(photos, folder / "runs", "begun"), whole


@pytest.fixture
def begun(origin: tuple[Path, Run, Run], tmp_path: Path) -> tuple[Path, Run]:
    """(photos, the run that was begun on them), for this test alone."""
    folder, run, _ = origin
    old, new = folder / "photos", tmp_path / "photos"
    shutil.copytree(old, new)
    shutil.copytree(run.path, tmp_path / "runs" / "begun")
    for name in ("config.toml", "data.csv", "predictions.csv"):
        file = tmp_path / "runs" / "begun" / name
        file.write_text(file.read_text().replace(str(old), str(new)))
    return new, Run.open(tmp_path / "runs" / "begun")


def files_of(run: Run, name: str) -> dict[str, str]:
    """SHA-256 and class -> file, as a table of the run has them."""
    with (run.path / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["sha256"] + row.get("class", row.get("label", "")): row["file"] for row in rows}


def elsewhere(photos: Path, run: Run) -> Path:
    return photos.rename(photos.parent / "attic")


def renamed_and_nested(photos: Path, run: Run) -> Path:
    """Other names, in another order, in folders of the classes."""
    for n, path in enumerate(sorted(photos.glob("*/*.png"), reverse=True)):
        (path.parent / f"{n % 2}").mkdir(exist_ok=True)
        path.rename(path.parent / f"{n % 2}" / f"{n:03}.png")
    return photos.rename(photos.parent / "sorted")


def split_folders(photos: Path, run: Run) -> Path:
    """The split that was drawn, as folders."""
    for split, samples in run.images().items():
        for path, label in zip(samples.paths, samples.labels, strict=True):
            to = photos.parent / "splits" / split / samples.classes[label]
            to.mkdir(parents=True, exist_ok=True)
            shutil.move(path, to)
    return photos.parent / "splits"


@pytest.mark.parametrize("move", [elsewhere, renamed_and_nested, split_folders])
def test_a_run_goes_on_with_the_same_images_elsewhere(cnnft: Cli, origin, begun, move) -> None:
    photos, run = begun
    data = move(photos, run)
    outcome = cnnft("finetune", "--resume", run.path, data)
    assert outcome.code == 0, outcome.err
    same(run, origin[2])
    for name in ("data.csv", "predictions.csv"):
        files = files_of(run, name)
        assert files.keys() == files_of(origin[2], name).keys()
        assert all(
            Path(file).is_relative_to(data) and Path(file).is_file() for file in files.values()
        )
    assert run.config().dataset.data == str(data)


def test_train_and_val_folders_may_become_one(cnnft: Cli, tmp_path: Path, separated: Path) -> None:
    """The split is the run's, not one that is drawn."""
    whole = finish(settings(separated, tmp_path, "whole").replace(epochs=2))
    run = begin(separated, tmp_path / "runs", "begun")
    for path in sorted(separated.glob("*/*/*.png")):
        to = tmp_path / "flat" / path.parent.name / f"{path.parts[-3]}-{path.name}"
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)
    outcome = cnnft("finetune", "--resume", run.path, tmp_path / "flat", "--layout", "auto")
    assert outcome.code == 0, outcome.err
    same(run, whole)


def test_a_project_that_was_moved_finds_its_images(cnnft: Cli, origin, begun) -> None:
    photos, run = begun
    project = photos.parent / "project"
    project.mkdir()
    for folder in (photos, run.path.parent):
        folder.rename(project / folder.name)
    run = Run.open((project / "runs" / "begun").rename(project / "runs" / "renamed"))
    outcome = cnnft("finetune", "--resume", run.path)
    assert outcome.code == 0, outcome.err
    assert f"going on with the images in {project / 'photos'}" in outcome.err
    same(run, origin[2])
    assert run.config().dataset.data == str(project / "photos")


def test_a_teacher_may_have_moved_too(
    cnnft: Cli, trained: Path, finetuned: Path, flat: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "teacher")
    more = {"augment": "none", "epochs": 2, "teacher": (str(tmp_path / "teacher"),)}
    config = settings(flat, tmp_path, "student").replace(**more)
    events = run_plan(prepare(config))
    run = next(event.run for event in events if isinstance(event, Started))
    while not isinstance(next(events), Epoch):
        pass
    events.close()
    (tmp_path / "teacher").rename(tmp_path / "professor")
    cnnft("finetune", "--resume", run.path).fails_with(2, f"{tmp_path / 'teacher'}: no such run")
    again = ("finetune", "--resume", run.path, "--teacher")
    cnnft(*again, finetuned).fails_with(1, "a teacher's weights are others")
    outcome = cnnft(*again, tmp_path / "professor")
    assert outcome.code == 0, outcome.err
    same(run, finish(config.replace(name="whole", teacher=(str(tmp_path / "professor"),))))


def test_a_place_that_is_empty_or_has_another_class_names_the_run(cnnft: Cli, begun) -> None:
    photos, run = begun
    draw(photos / "wasps" / "0.png", 2, 0)
    resume = ("finetune", "--resume", run.path)
    way_out = f"if its images are elsewhere now: cnnft finetune --resume {run.path} DATA"
    cnnft(*resume).fails_with(1, f"{run.path} cannot go on", "wasps", "is no class of", way_out)
    elsewhere(photos, run)
    photos.mkdir()  # where nothing is mounted
    cnnft(*resume).fails_with(1, f"{run.path} cannot go on", "holds no class folders", way_out)


def test_images_that_are_nowhere_are_asked_for(cnnft: Cli, begun) -> None:
    photos, run = begun
    draw_folder(photos.parent / "runs" / "photos", ("ants", "bees"), 2, first_seed=50)  # not they
    elsewhere(photos, run)
    before = (run.path / "data.csv").read_bytes()
    cnnft("finetune", "--resume", run.path).fails_with(
        1, f"are not in {photos} any more", f"cnnft finetune --resume {run.path} DATA"
    )
    cnnft("finetune", "--resume", run.path, photos).fails_with(2, f"{photos}: no such folder")
    assert (run.path / "data.csv").read_bytes() == before


def removed(photos: Path) -> list[str]:
    for n in (4, 5):
        (photos / "bees" / f"{n}.png").unlink()
    return ["2 image(s) are not there, or changed, such as ", "/bees/"]


def added(photos: Path) -> list[str]:
    draw(photos / "ants" / "new.png", 0, 77)
    return [f"1 image(s) are new, or changed, such as {photos / 'ants' / 'new.png'}"]


def changed(photos: Path) -> list[str]:
    draw(photos / "ants" / "0.png", 0, 77)
    return [
        "1 image(s) are not there, or changed, such as ",
        f"1 image(s) are new, or changed, such as {photos / 'ants' / '0.png'}",
    ]


def relabelled(photos: Path) -> list[str]:
    (photos / "ants" / "1.png").rename(photos / "bees" / "11.png")
    return ["began, 1 image(s) are in another split or class, such as ", "ants/1.png;"]


def doubled(photos: Path) -> list[str]:
    shutil.copy(photos / "ants" / "1.png", photos / "ants" / "1 (copy).png")
    return ["began, 1 image(s) are new, or changed, such as "]


@pytest.mark.parametrize("change", [removed, added, changed, relabelled, doubled])
def test_other_images_are_refused_and_counted(cnnft: Cli, begun, change) -> None:
    photos, run = begun
    parts = change(photos)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    data = elsewhere(photos, run)
    parts = [part.replace(str(photos), str(data)) for part in parts]
    cnnft("finetune", "--resume", run.path, data).fails_with(1, "cannot go on", *parts)
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- images that are gone


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A finished run on ants and bees without its images."""
    run = Path(shutil.copytree(trained, tmp_path / "copied"))
    for name in ("config.toml", "data.csv", "predictions.csv"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace(str(trained.parents[1]), str(tmp_path / "gone")))
    return run


def test_what_reads_no_images_works_without_them(
    cnnft: Cli, trained: Path, copied: Path, flat: Path, tmp_path: Path
) -> None:
    for command in (
        ("predict", flat, "-m", copied),
        ("diff", trained, copied),
        ("export", copied, "--format", "head"),
        ("export", copied, "--format", "safetensors"),
    ):
        outcome = cnnft(*command)
        assert (outcome.code, outcome.err.count("warning")) == (0, 0), outcome.err
    data = trained.parents[1] / "data"
    outcome = cnnft("evaluate", data, "-m", copied, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == cnnft("evaluate", data, "-m", trained, "--json").out


def test_evaluate_says_what_it_cannot_recognise(
    cnnft: Cli, trained: Path, copied: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(trained.parents[1] / "data", tmp_path / "data"))
    splits = Run.open(copied).dataset().splits
    name, label = splits["train"].paths[0], splits["train"].labels[0]
    draw(data / Path(name).parent.name / Path(name).name, label, 99)
    Path(data, *Path(splits["val"].paths[0]).parts[-2:]).unlink()
    outcome = cnnft("evaluate", data, "-m", copied, "--json")
    assert outcome.code == 0
    assert f"2 image(s) of the training and validation of {copied} are not in {data}" in outcome.err
    found = json.loads(outcome.out)
    assert found["n"] == len(splits["val"]) and found["left_out"] == len(splits["train"]) - 1
    others = draw_folder(tmp_path / "others", ("ants", "bees"), 2, first_seed=400)
    known = Path(data, *Path(splits["train"].paths[1]).parts[-2:])
    shutil.copy(known, others / "ants" / "known.png")  # one that it knows is no reason
    assert "were changed" not in cnnft("evaluate", others, "-m", copied).err


def test_a_teacher_that_lost_its_data_teaches_all_the_same(
    cnnft: Cli, copied: Path, flat: Path, tmp_path: Path
) -> None:
    (copied / "data.csv").unlink()
    outcome = cnnft(
        "finetune", flat, "--teacher", copied, "--backbone=builtin", "--epochs=1", "--dry-run"
    )
    assert outcome.code == 0, outcome.err
    assert f"{copied / 'data.csv'} cannot be read" in outcome.err
    assert "whether --teacher was trained on validation images is not known" in outcome.err


# ---------------------------------------------------------------- one name, several processes


def test_of_two_that_replace_a_run_at_once_one_does(
    cnnft: Cli, trained: Path, flat: Path, tmp_path: Path
) -> None:
    """The other one came while the run was moved away, and deleted the copy that was kept."""
    run = Path(shutil.copytree(trained, tmp_path / "runs" / "run"))
    again = ["finetune", flat, "--backbone=builtin", "--epochs=1", "--workers=0", "--name=run"]
    again += ["--runs-dir", run.parent, "--force"]
    ways = [
        ("is being replaced by another process", lambda: _replacing(run)),
        ("is being trained by another process", Run.open(run).locked),
    ]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for sentence, busy in ways:
        with busy():
            cnnft(*again).fails_with(1, f"{run} {sentence}")
        assert before.items() <= {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}.items()
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    shutil.rmtree(run)
    run.mkdir()
    cnnft(*again).fails_with(1, f"{run} was just begun by another process")


def test_a_name_that_is_taken_is_said(cnnft: Cli, trained: Path, flat: Path) -> None:
    again = ["finetune", flat, "--backbone=builtin", "--epochs=1", "--mode=feature-extractor"]
    outcome = cnnft(*again, "--workers=0", "--name=frozen", "--runs-dir", trained.parent)
    assert outcome.out.strip() == f"{trained}-2"
    assert f"{trained} is there already: this run is {trained}-2" in outcome.err
    shutil.rmtree(f"{trained}-2")


@pytest.mark.slow
def test_two_processes_at_once_lose_nothing(trained: Path, flat: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "run")
    command = [sys.executable, "-m", "cnnft", "finetune", flat, "--backbone=builtin", "--epochs=2"]
    command += ["--workers=0", "--name=run", "--force", "--runs-dir", runs, "--no-probe-first"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and {*codes} <= {0, 1}, said
    for code, text in zip(codes, said, strict=True):
        if code:
            assert "error: " in text and "by another process" in text.splitlines()[-1]
    assert [path.name for path in runs.iterdir()] == ["run"]
    run = Run.open(runs / "run")
    assert len(run.history()) == 2 and run.predictions() and run.load_checkpoint()


def test_an_image_under_two_classes_is_said(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    shutil.copy(flat / "ants" / "0.png", flat / "bees" / "the same.png")
    outcome = cnnft("finetune", flat, "--backbone=builtin", "--epochs=1", "--dry-run", "--json")
    pair = [str(flat / "ants" / "0.png"), str(flat / "bees" / "the same.png")]
    assert f"1 image(s) lie under two classes, such as {' = '.join(pair)}: one" in outcome.err
    assert json.loads(outcome.out)["contradictions"] == [pair]
