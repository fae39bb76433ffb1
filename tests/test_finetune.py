"""cnnft finetune: the summary, the run directory, reproducibility, what trains."""

import csv
import gc
import json
import multiprocessing
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, draw, draw_folder
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

import cnnft as package
from cnnft import Config, finetune, load
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]
Finetune = Callable[..., Outcome]

FILES = {
    "formats.json", "config.toml", "config.json", "model.safetensors", "history.csv",
    "metrics.json",
    "metrics.jsonl", "data.csv", "predictions.csv", "environment.json", "run.log", "state",
}  # fmt: skip


@pytest.fixture
def train(cnnft: Cli, tmp_path: Path) -> Finetune:
    """`cnnft finetune`, one cheap epoch into tmp_path/runs; later arguments win."""

    def run(*arguments: object) -> Outcome:
        return cnnft(
            "finetune", "--backbone=builtin", "--mode=feature-extractor",
            "--head-solver=sgd", "--epochs=1",
            "--workers=0", "--runs-dir", tmp_path / "runs", *arguments,
        )  # fmt: skip

    return run


def succeed(outcome: Outcome) -> Path:
    assert outcome.code == 0, outcome.err
    return Path(outcome.out.strip())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def history(run: Path) -> list[dict[str, float]]:
    with (run / "history.csv").open(newline="") as file:
        return [
            {name: float({"True": 1, "False": 0}.get(value, value)) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def head_of(run: Path) -> set[str]:
    return set(json.loads((run / "config.json").read_text())["cnnft"]["head"])


# ---------------------------------------------------------------- what is said


def test_summary_says_what_will_be_trained_on_what_and_how_fast(
    train: Finetune, separated: Path
) -> None:
    err = train(separated, "--mode", "finetune", "--batch-size", 16, "--dry-run").err
    rows = [line.split() for line in err.splitlines()]
    for name in ("ants", "bees", "wasps"):
        assert [name, "6", "3"] in rows
    assert ["3", "classes", "18", "9"] in rows
    builtin = load_file(Path(package.__file__).parent / "models" / "builtin" / "model.safetensors")
    matched = sum(not name.endswith("num_batches_tracked") for name in builtin)
    assert f"builtin, {matched} pretrained tensors" in err
    assert "0.1 (original, per 256 images) × 16 / 256 = 0.00625" in err
    assert (
        "head: 0.00625 / 10 = 0.000625 (probed)" in err
        and "0.00625 / 10 = 0.000625 (pretrained)" in err
    )
    assert "1 epochs of 2 steps" in err and "cosine schedule" in err


@pytest.mark.parametrize("mode", ["finetune", "feature-extractor"])
def test_trained_and_frozen_numbers_add_up(train: Finetune, flat: Path, mode: str) -> None:
    outcome = train(flat, "--mode", mode, "--dry-run", "--json")
    plan = json.loads(outcome.out)
    network = prepare(Config.of(flat, backbone="builtin", workers=0)).classifier.network
    total = sum(p.numel() for p in network.parameters())
    head = 2 * 256 + 2
    expected = (total, 0) if mode == "finetune" else (head, total - head)
    assert (plan["parameters"]["trained"], plan["parameters"]["frozen"]) == expected
    assert f"{expected[0]:,} parameters train, {expected[1]:,} frozen" in outcome.err


def test_dry_run_writes_nothing(train: Finetune, flat: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = train(flat, "--dry-run")
    assert outcome.code == 0 and outcome.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_keeps_the_run_that_force_would_replace(
    train: Finetune, flat: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "runs" / "x" / "config.toml"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert train(flat, "--name=x", "--force", "--dry-run").code == 0
    assert kept.is_file()


def test_standard_output_is_the_run_path_alone(train: Finetune, flat: Path, tmp_path: Path) -> None:
    outcome = train(flat, "--name", "one")
    assert outcome.out == f"{tmp_path / 'runs' / 'one'}\n"
    assert "best epoch 1: val accuracy" in outcome.err and "selected on val" in outcome.err
    assert "n = 4" in outcome.err


def test_quiet_says_nothing_but_the_result(train: Finetune, flat: Path, tmp_path: Path) -> None:
    outcome = train(flat, "--quiet")
    assert outcome.err == ""
    assert outcome.out == f"{tmp_path / 'runs' / 'flat-builtin'}\n"


def test_json_is_one_document_that_agrees_with_the_run(train: Finetune, flat: Path) -> None:
    told = json.loads(train(flat, "--json", "--epochs", 2).out)
    run = Path(told["run"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert told == {"run": str(run), **metrics}
    assert told["val"]["n"] == 4
    assert "selected on val" in told["val"]["note"]


# ---------------------------------------------------------------- the run directory


def test_a_run_holds_the_documented_files_and_only_those(train: Finetune, flat: Path) -> None:
    run = succeed(train(flat, "--epochs", 3))
    assert {path.name for path in run.iterdir()} == FILES
    assert [row["epoch"] for row in history(run)] == [1, 2, 3]

    with (run / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["file"]) for row in rows} == set(flat.glob("*/*.png"))
    assert all(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert [row["split"] for row in rows] == ["train"] * 16 + ["val"] * 4

    settings = tomllib.loads((run / "config.toml").read_text())
    assert settings["data"] == str(flat) and settings["epochs"] == 3
    assert "force" not in settings

    description = json.loads((run / "config.json").read_text())
    assert description["architecture"] == "resnet10t" and description["num_classes"] == 2
    assert description["cnnft"]["classes"] == ["ants", "bees"]


def test_unreadable_images_are_listed_with_their_reason(train: Finetune, flat: Path) -> None:
    broken, empty = flat / "ants" / "broken, really.png", flat / "bees" / "empty.jpg"
    broken.write_bytes(b"no image")
    empty.touch()
    outcome = train(flat)
    run = succeed(outcome)
    assert {path.name for path in run.iterdir()} == FILES | {"skipped.csv"}
    with (run / "skipped.csv").open(newline="") as file:
        rows = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert rows.keys() == {str(broken), str(empty)}
    assert "not an image" in rows[str(broken)] and "empty" in rows[str(empty)]
    for path, reason in rows.items():
        assert f"warning: skipped {path}: {reason}" in outcome.err
    assert "broken" not in (run / "data.csv").read_text()


def test_names_count_up_and_force_replaces(train: Finetune, flat: Path) -> None:
    first = succeed(train(flat))
    assert first.name == "flat-builtin"
    second = succeed(train(flat, "--seed", 1))
    assert second.name == "flat-builtin-2"
    kept = weights(first)
    (first / "old").touch()
    replaced = succeed(train(flat, "--seed", 2, "--force"))
    assert replaced == first and {path.name for path in first.iterdir()} == FILES
    assert not same(weights(first), kept)
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, second.name]


def test_force_deletes_nothing_that_is_no_run(train: Finetune, flat: Path, tmp_path: Path) -> None:
    precious = tmp_path / "runs" / "photos" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    outcome = train(flat, "--name", "photos", "--force")
    assert outcome.code == 2 and "is not a run" in outcome.err
    assert precious.read_text() == "mine"
    assert list(precious.parents[1].rglob("*")) == [precious.parent, precious]


def test_force_keeps_the_old_run_when_the_data_is_bad(
    train: Finetune, flat: Path, tmp_path: Path
) -> None:
    old = tmp_path / "runs" / "x" / "config.toml"
    old.parent.mkdir(parents=True)
    old.touch()
    shutil.rmtree(flat / "bees")
    assert train(flat, "--name", "x", "--force").code == 1
    assert old.is_file()


def test_a_run_finds_its_images_from_another_directory(
    train: Finetune, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = succeed(train(flat.name))
    monkeypatch.chdir("/")
    assert Path(tomllib.loads((run / "config.toml").read_text())["data"]) == flat
    with (run / "data.csv").open(newline="") as file:
        assert {Path(row["file"]) for row in csv.DictReader(file)} == set(flat.glob("*/*.png"))


# ---------------------------------------------------------------- the best epoch


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Epochs of a rate so high that accuracy goes up and down."""
    folder = tmp_path_factory.mktemp("long")
    data = draw_folder(folder / "data", ("ants", "bees", "wasps"), 12)
    return finetune(
        data, backbone="builtin", mode="feature-extractor",
        head_solver="sgd", epochs=6, workers=0, val_fraction=0.4,
        head_lr=40.0, batch_size=4, momentum=0.0, schedule="step", runs_dir=folder, seed=3,
    ).path  # fmt: skip


def test_the_best_epoch_is_that_of_the_highest_val_accuracy(long_run: Path) -> None:
    rows = history(long_run)
    best = min(rows, key=lambda row: (-row["val_accuracy"], row["val_loss"], row["epoch"]))
    assert best["epoch"] < len(rows), "make the run longer: the last epoch proves nothing"
    metrics = json.loads((long_run / "metrics.json").read_text())
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["val"]["accuracy"] == best["val_accuracy"]
    assert metrics["val"]["loss"] == best["val_loss"]
    assert metrics["train"]["accuracy"] == best["train_accuracy"]
    assert metrics["val"]["correct"] == round(metrics["val"]["accuracy"] * metrics["val"]["n"])


def test_metrics_jsonl_is_the_history_with_the_step(long_run: Path) -> None:
    rows = [json.loads(line) for line in (long_run / "metrics.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [5 * n for n in range(1, 7)]  # of 21 images
    assert rows == history(long_run)
    assert list(rows[0]) == (long_run / "history.csv").read_text().splitlines()[0].split(",")


def test_the_saved_weights_are_those_of_the_best_epoch(long_run: Path) -> None:
    with (long_run / "data.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    predictions = load(long_run).predict([row["file"] for row in rows], workers=0)
    truth = [dict(p.top)[row["class"]] for p, row in zip(predictions, rows, strict=True)]
    correct = sum(p.label == row["class"] for p, row in zip(predictions, rows, strict=True))
    metrics = json.loads((long_run / "metrics.json").read_text())["val"]
    assert (correct, len(rows)) == (metrics["correct"], metrics["n"])
    loss = -torch.tensor(truth, dtype=torch.float64).log().mean().item()
    assert loss == pytest.approx(metrics["loss"], rel=1e-3)


# ---------------------------------------------------------------- reproducing


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetune run: seed 3, batches of 6, no worker."""
    folder = tmp_path_factory.mktemp("reference")
    data = draw_folder(folder / "data", ("ants", "bees"), 6)
    return finetune(
        data, backbone="builtin", epochs=1, workers=0, seed=3, batch_size=6,
        probe_first=False, runs_dir=folder / "runs", name="x",
    ).path  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_runs_config_file_reproduces_its_weights_to_the_bit(
    cnnft: Cli, reference: Path, workers: int
) -> None:
    torch.rand(5)  # whatever happened before
    outcome = cnnft("finetune", "--config", reference / "config.toml", "--workers", workers)
    run = succeed(outcome)
    assert run != reference and run.parent == reference.parent
    assert run.name.startswith("x-")
    assert same(weights(run), weights(reference))
    drop = ("seconds",)
    rows, expected = (
        [{k: v for k, v in row.items() if k not in drop} for row in history(path)]
        for path in (run, reference)
    )
    assert rows == expected


def test_flags_override_the_config_file(cnnft: Cli, reference: Path) -> None:
    outcome = cnnft("finetune", "--config", reference / "config.toml", "--seed", 4)
    run = succeed(outcome)
    settings, before = (
        tomllib.loads((path / "config.toml").read_text()) for path in (run, reference)
    )
    assert settings == before | {"seed": 4}
    assert not same(weights(run), weights(reference))


def test_data_on_the_command_line_overrides_the_config_file(
    cnnft: Cli, reference: Path, flat: Path
) -> None:
    outcome = cnnft(
        "finetune", flat, "--config", reference / "config.toml", "--dry-run", "--json",
    )  # fmt: skip
    assert json.loads(outcome.out)["classes"] == {
        "ants": {"train": 8, "val": 2},
        "bees": {"train": 8, "val": 2},
    }


# ---------------------------------------------------------------- what trains


def pretrained(flat: Path, **settings: Any) -> dict[str, torch.Tensor]:
    plan = prepare(Config.of(flat, backbone="builtin", workers=0, **settings))
    return plan.classifier.network.state_dict()


def test_feature_extractor_changes_the_head_and_nothing_else(trained: Path) -> None:
    before = pretrained(trained.parents[1] / "data", mode="feature-extractor", head_solver="sgd")
    after, head = weights(trained), head_of(trained)
    assert head == {"fc.weight", "fc.bias"}
    assert any("running_var" in name for name in after)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == head


def test_finetune_changes_every_layer(finetuned: Path) -> None:
    before, after = pretrained(finetuned.parents[1] / "data"), weights(finetuned)
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    assert unchanged == set()


# ---------------------------------------------------------------- layouts and sizes


@pytest.mark.parametrize(("folder", "counts"), [("val", (6, 3)), ("valid", (6, 3)), (None, (5, 1))])
def test_val_valid_or_a_part_of_train_and_test_is_left_alone(
    train: Finetune, separated: Path, folder: str | None, counts: tuple[int, int]
) -> None:
    if folder is None:
        shutil.rmtree(separated / "val")
    else:
        (separated / "val").rename(separated / folder)
    draw_folder(separated / "test", ("ants", "bees", "wasps"), 2, first_seed=500)
    (separated / "test" / "ants" / "broken.jpg").write_bytes(b"no image")
    outcome = train(separated, "--json")
    run = Path(json.loads(outcome.out)["run"])
    with (run / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("ants", "bees", "wasps"):
        for split, count in zip(("train", "val"), counts, strict=True):
            assert sum(r["class"] == name and r["split"] == split for r in rows) == count
    part = separated / (folder or "train")
    assert all(Path(r["file"]).is_relative_to(part) for r in rows if r["split"] == "val")
    assert "test" not in {Path(r["file"]).parents[1].name for r in rows}
    assert "skipped" not in outcome.err


def test_val_images_get_their_label_by_folder_name(train: Finetune, separated: Path) -> None:
    """A stray first folder in train's place would shift labels that go by position."""
    (separated / "val" / "Wasps").mkdir()
    shutil.copy(separated / "train" / "ants" / "0.png", separated / "val" / "Wasps")
    assert train(separated).code == 1
    shutil.rmtree(separated / "val" / "Wasps")
    run = succeed(train(separated))
    with (run / "data.csv").open(newline="") as file:
        assert all(Path(r["file"]).parent.name == r["class"] for r in csv.DictReader(file))


def test_class_order_is_imagefolders_with_upper_and_lower_case(
    train: Finetune, tmp_path: Path
) -> None:
    folder = draw_folder(tmp_path / "data", ("bees", "Wasps", "ants", "Zebras", "10", "9"), 2)
    told = json.loads(train(folder, "--dry-run", "--json").out)
    assert list(told["classes"]) == ImageFolder(str(folder)).classes


@pytest.mark.parametrize(
    ("train_images", "batch_size", "steps"),
    [(17, 16, 1), (18, 16, 2), (5, 64, 1), (4, 1, 4)],
    ids=["last batch of one", "last batch of two", "less than a batch", "batches of one"],
)
def test_any_number_of_images_trains(
    train: Finetune, tmp_path: Path, train_images: int, batch_size: int, steps: int
) -> None:
    folder = tmp_path / "data"
    for i in range(train_images):
        draw(folder / "train" / ("ants", "bees")[i % 2] / f"{i}.png", i % 2, i)
    draw_folder(folder / "val", ("ants", "bees"), 1, first_seed=100)
    outcome = train(folder, "--mode", "finetune", "--batch-size", batch_size)
    run = succeed(outcome)
    assert f"1 epochs of {steps} steps" in outcome.err
    assert len(history(run)) == 1 and all(v == v for v in history(run)[0].values())
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_other_image_formats_are_trained_on(train: Finetune, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "data", ("ants", "bees"), 6)
    suffixes = (".gif", ".bmp", ".tiff", ".webp", ".tif", ".JPG")
    for path in sorted(folder.glob("*/*.png")):
        Image.open(path).save(path.with_suffix(suffixes[int(path.stem)]))
        path.unlink()
    run = succeed(train(folder))
    with (run / "data.csv").open(newline="") as file:
        assert sorted(Path(row["file"]).suffix for row in csv.DictReader(file)) == sorted(
            suffixes * 2
        )


def test_the_screen_calls_best_what_the_run_keeps(train: Finetune, flat: Path) -> None:
    """At equal accuracy the lower loss wins: on the screen, in the history and in the metrics."""
    run = succeed(outcome := train(flat, "--epochs", 4, "--head-lr", 0.5))
    lines = [line for line in outcome.err.splitlines() if "/4 " in line]
    told = [number for number, line in enumerate(lines, 1) if line.endswith("best so far")]
    rows = history(run)
    order = [(-row["val_accuracy"], row["val_loss"]) for row in rows]
    assert told == [n for n, key in enumerate(order, 1) if key == min(order[:n])]
    assert told == [int(row["epoch"]) for row in rows if row["best"]]
    assert told[-1] == json.loads((run / "metrics.json").read_text())["best_epoch"]


def test_a_run_is_named_after_the_folder_that_a_dot_means(
    cnnft: Cli, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flat / "ants")
    outcome = cnnft(
        "finetune", "..", "--backbone=builtin", "--mode=feature-extractor",
        "--head-solver=sgd", "--epochs=1",
        "--workers=0", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert succeed(outcome).name == "flat-builtin"


def test_training_that_diverges_stops_with_a_sentence(
    train: Finetune, flat: Path, tmp_path: Path
) -> None:
    outcome = train(flat, "--mode", "finetune", "--lr", 1e30, "--epochs", 3)
    outcome.fails_with(1, "training diverged", "lower --lr or --head-lr")


def test_no_process_that_loads_images_outlives_training(train: Finetune, flat: Path) -> None:
    """It ignores signals, so Python would wait for it at its exit, for ever."""
    before = set(multiprocessing.active_children())
    gc.disable()  # which would end it some time
    try:
        succeed(train(flat, "--workers", 1))
        assert set(multiprocessing.active_children()) == before
    finally:
        gc.enable()


def test_split_folders_are_known_in_any_case(train: Finetune, separated: Path) -> None:
    (separated / "train").rename(separated / "Train")
    (separated / "val").rename(separated / "Validation")
    told = json.loads(train(separated, "--dry-run", "--json").out)
    assert told["classes"]["bees"] == {"train": 6, "val": 3}
