"""Whatever is wrong with the input: one sentence, the right exit code, nothing written.

2: a flag, a name or a path is wrong; 1: what is in the files, or the machine.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import Outcome, draw
from PIL import Image
from safetensors.torch import load_file, save_file

import cnnft as package
from cnnft.errors import first_line
from cnnft.inference.description import describe
from cnnft.machine.files import kind_of
from cnnft.models.downloads import DownloadError
from cnnft.models.hub import Remote

Cli = Callable[..., Outcome]

BUILTIN = Path(package.__file__).parent / "models" / "builtin" / "model.safetensors"


@pytest.fixture
def refused(cnnft: Cli, tmp_path: Path) -> Callable[..., None]:
    """`refused(code, parts, *arguments)`: finetune fails so, and leaves no run behind."""

    def run(code: int, parts: str | tuple[str, ...], *arguments: object) -> None:
        runs = tmp_path / "runs"
        outcome = cnnft(
            "finetune", "--backbone=builtin", "--epochs=1", "--workers=0", "--runs-dir", runs,
            *arguments,
        )  # fmt: skip
        outcome.fails_with(code, *([parts] if isinstance(parts, str) else parts))
        assert not runs.exists()

    return run


Refused = Callable[..., None]

# ---------------------------------------------------------------- data


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path)


def unreadable(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"no image")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def rename(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


Damage = Callable[[Path], object]
FLAT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no class folders": (lambda d: only(d), ("no class folders", "one folder per class")),
    "one class": (lambda d: only(d, "bees"), ("one class only", "bees")),
    "an empty class": (lambda d: empty(d / "bees"), ("bees", "holds no images")),
    "an unreadable class": (lambda d: unreadable(d / "bees"), ("class bees",)),
    "one image in each class": (
        lambda d: [p.unlink() for p in d.glob("*/*") if p.stem != "0"],
        ("no class has two different images", "add images, or a val folder"),
    ),
}
SEPARATED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "unknown class in val": (
        lambda d: draw(d / "val" / "flies" / "0.png", 0, 0),
        ("flies", "ants, bees, wasps"),
    ),
    "class empty in train": (
        lambda d: empty(d / "train/bees"),
        ("val/bees/ is no class of the training data (ants, wasps)",),
    ),
    "class unreadable in train": (lambda d: unreadable(d / "train/bees"), ("class bees", "train")),
    "all of val unreadable": (
        lambda d: [unreadable(c) for c in (d / "val").iterdir()],
        ("no readable validation image",),
    ),
    "val equals train": (
        lambda d: (shutil.rmtree(d / "val"), shutil.copytree(d / "train", d / "val")),
        ("no readable validation image",),
    ),
    "val without train": (lambda d: shutil.rmtree(d / "train"), ("no train folder",)),
    "test without train": (
        lambda d: (rename(d / "train", "bees"), rename(d / "val", "test")),
        ("two ways: give --layout flat if bees, test are the classes", "or move bees into"),
    ),
    "two folders for val": (
        lambda d: shutil.copytree(d / "val", d / "valid"),
        ("val and", "valid are both a val folder"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), FLAT.values(), ids=FLAT)
def test_flat_folder_that_cannot_train(
    refused: Refused, flat: Path, damage: Damage, parts: tuple[str, ...]
) -> None:
    damage(flat)
    refused(1, parts, flat)


@pytest.mark.parametrize(("damage", "parts"), SEPARATED.values(), ids=SEPARATED)
def test_train_and_val_folders_that_cannot_train(
    refused: Refused, separated: Path, damage: Damage, parts: tuple[str, ...]
) -> None:
    damage(separated)
    refused(1, parts, separated)


def test_data_that_is_no_folder(refused: Refused, flat: Path) -> None:
    refused(2, ("nowhere", "no such folder"), flat / "nowhere")
    refused(2, "is a file", flat / "ants" / "0.png")
    refused(2, "give the folder of images")


def test_strict_stops_at_an_unreadable_image(refused: Refused, flat: Path) -> None:
    (flat / "ants" / "3.png").write_bytes(b"no image")
    refused(1, (str(flat / "ants" / "3.png"), "not an image", "--strict"), flat, "--strict")


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", 0),
        ("--epochs", -1),
        ("--batch-size", 0),
        ("--image-size", 10**9),
        ("--lr", 0),
        ("--lr", -0.1),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--head-lr", 0),
        ("--head-lr", "inf"),
        ("--head-lr", "nan"),
        ("--weight-decay", -0.1),
        ("--weight-decay", "nan"),
        ("--warmup-epochs", -1),
        ("--warmup-epochs", 1),
        ("--warmup-epochs", "nan"),
        ("--val-fraction", 0),
        ("--val-fraction", 1),
        ("--val-fraction", -0.5),
        ("--val-fraction", "nan"),
        ("--erase", 1.5),
        ("--mixup", -1),
        ("--cutmix", "inf"),
        ("--workers", -1),
        ("--seed", -1),
        ("--seed", 2**63),
    ],
)
def test_numbers_out_of_range(refused: Refused, flat: Path, flag: str, value: object) -> None:
    refused(2, (flag, str(value), "out of range"), flat, f"{flag}={value}")


def test_a_number_whose_quotients_no_float_can_hold(refused: Refused, flat: Path) -> None:
    refused(2, ("--epochs", "out of range", "1e+100 at most"), flat, f"--epochs={10**400}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--epochs", "many"), ("--epochs", "1.5"), ("--lr", "fast"), ("--mode", "freeze"),
     ("--schedule", "linear"), ("--seed", "x"), ("--augment", "mild"), ("--mixup", "on")],
)  # fmt: skip
def test_values_of_the_wrong_kind(refused: Refused, flat: Path, flag: str, value: str) -> None:
    refused(2, (flag,), flat, f"{flag}={value}")


def test_an_unknown_flag_or_command(cnnft: Cli, refused: Refused, flat: Path) -> None:
    refused(2, "--epoch", flat, "--epoch", 3)
    cnnft("fine-tune", flat).fails_with(2, "fine-tune")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--lr=0.1", "--mode=feature-extractor"), ("--lr", "--head-lr")),
        (("--weights", BUILTIN, "--no-pretrained", "--backbone=test_resnet"), ("contradict",)),
        (("--weights", BUILTIN), ("builtin",)),
        (("--decay-all",), ("--decay-all", "--weight-decay")),
        (("--optimizer=adamv",), ("unknown --optimizer 'adamv'", "did you mean adam ")),
        (("--optimizer=lbfgs",), ("--optimizer lbfgs computes the loss several times",)),
        (("--optimizer=adahessian",), ("second derivatives",)),
        (("--optimizer=kron",), ("random numbers of its own",)),
        (("--optimizer=bnbadam",), ("bitsandbytes",)),
        (("--schedule=one-cycle", "--warmup-epochs=0.5"), ("rises by itself", "cycle_rise")),
        (("--dry-run", "--plot-schedule=rates.jpg"), (".png or .svg",)),
        (("--name=a/b",), ("--name 'a/b'",)),
        (("--name=..",), ("--name '..'",)),
        (("--name=",), ("--name ''",)),
        (("--device=nonsense",), ("--device nonsense",)),
        (("--device=meta",), ("--device meta",)),
        (("--device=hpu",), ("--device hpu",)),
    ],
)
def test_flags_that_make_no_sense(
    refused: Refused, flat: Path, flags: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(2, parts, flat, *flags)


def test_a_runs_dir_that_is_a_file(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--epochs=1", "--workers=0", "--runs-dir", file,
    )  # fmt: skip
    outcome.fails_with(1, str(file), "--runs-dir")
    assert file.read_text() == "mine"


# ---------------------------------------------------------------- backbones and weights


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("buildin", "builtin"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("torchvision/resnet18@V3", "IMAGENET1K_V1"),
        ("hf-hub:someone", "OWNER/NAME"),
    ],
)
def test_unknown_backbones_name_the_nearest(
    refused: Refused, flat: Path, name: str, near: str
) -> None:
    refused(2, near, flat, "--backbone", name)


def test_a_local_folder_without_a_description(refused: Refused, flat: Path, tmp_path: Path) -> None:
    refused(2, "config.json", flat, "--backbone", f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"')
    refused(1, "config.json", flat, "--backbone", f"local-dir:{tmp_path}")


class Attack:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def pickled(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def packed(path: Path) -> Path:
    """The same archive, deflated."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


Weights = Callable[[Path], Path]
WRONG_WEIGHTS: dict[str, tuple[Weights, str]] = {
    "of another architecture": (lambda f: BUILTIN, "does not hold weights of test_resnet"),
    "a truncated file": (
        lambda f: written(f / "w.safetensors", BUILTIN.read_bytes()[:100_000]),
        "cannot be read as weights",
    ),
    "text": (lambda f: written(f / "w.pth", b"<html>not found</html>"), "cannot be read"),
    "text named safetensors": (lambda f: written(f / "w.safetensors", b"hello"), "cannot be read"),
    "an empty file": (lambda f: written(f / "w.pth", b""), "cannot be read"),
    "no tensors": (lambda f: saved(f / "w.pth", {"epoch": 3}), "no state dict"),
    "terabytes in four bytes": (
        lambda f: saved(f / "w.pth", {"fc.weight": torch.zeros(1).expand(10**6, 10**6)}),
        "'fc.weight' that is no plain array",
    ),
    "an archive that unpacks without end": (
        lambda f: packed(saved(f / "w.pth", {"fc.weight": torch.zeros(10**6)})),
        "its parts are larger than the file",
    ),
    "a whole pickled object": (lambda f: saved(f / "w.pt", Path("x")), "cannot be read"),
}


@pytest.mark.parametrize(("make", "part"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_files_that_are_not_the_weights(
    refused: Refused, flat: Path, tmp_path: Path, make: Weights, part: str
) -> None:
    path = make(tmp_path)
    refused(1, (str(path), part), flat, "--backbone=test_resnet", "--weights", path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("save", [pickled, saved])
def test_code_in_a_weights_file_does_not_run(
    refused: Refused, flat: Path, tmp_path: Path, suffix: str, save: Callable[..., Path]
) -> None:
    target = tmp_path / "owned"
    path = save(tmp_path / f"w{suffix}", {"fc.weight": Attack(target)})
    refused(1, "cannot be read", flat, "--backbone=test_resnet", "--weights", path)
    assert not target.exists()


def test_weights_that_are_not_there(refused: Refused, flat: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.pth", "no such"), (tmp_path, "is a folder")):
        refused(2, (str(path), words), flat, "--backbone=test_resnet", "--weights", path)


# ---------------------------------------------------------------- config files


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("epoch = 3", 2, "'epoch'"),
        ("epochs = 'three'", 2, "--epochs"),
        ("epochs = 2.0", 2, "--epochs"),
        ("epochs = true", 2, "--epochs"),
        ("mode = 'freeze'", 2, "--mode"),
        ("step_gamma = 0", 2, "step_gamma"),
        ("step_epochs = 0", 2, "step_epochs"),
        ("momentum = 1.0", 2, "momentum"),
        ("momentum = 0.0\noptimizer = 'nesterov'", 2, "take plain-sgd"),
        ("milestones = '10,5'", 2, "rising order"),
        ("milestones = 'ten'", 2, "rising order"),
        ("milestones = '10,30'\nschedule = 'multistep'", 2, "before the end, --epochs 25"),
        ("milestones = '1,9'\nschedule = 'multistep'\nwarmup_epochs = 2", 2, "after the warmup"),
        ("schedule = 'multistep'\nwarmup_epochs = 13", 2, "milestones 12.5 to 18.75"),
        ("restart_epochs = 25\nschedule = 'cosine-restarts'", 2, "before the first restart"),
        ("restart_epochs = 0", 2, "restart_epochs"),
        ("restart_multiplier = 0", 2, "restart_multiplier"),
        ("inverse_epochs = 0", 2, "inverse_epochs"),
        ("cycle_rise = 1", 2, "cycle_rise"),
        ("plateau_patience = -1", 2, "plateau_patience"),
        ("pretrained = 'yes'", 2, "--pretrained"),
        ("[training]\nepochs = 3", 2, "'training'"),
        ("epochs = ", 1, "not valid TOML"),
        ("epochs = " + "[" * 10_000 + "]" * 10_000, 1, "not valid TOML"),
        ("\x00", 1, "not valid TOML"),
    ],
)
def test_config_files(
    cnnft: Cli, flat: Path, tmp_path: Path, text: str, code: int, part: str
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    outcome = cnnft("finetune", flat, "--config", path, "--runs-dir", tmp_path / "runs")
    outcome.fails_with(code, part)
    assert not (tmp_path / "runs").exists()


def test_a_config_file_without_data(cnnft: Cli, tmp_path: Path) -> None:
    path = written(tmp_path / "my.toml", b"epochs = 3")
    cnnft("finetune", "--config", path).fails_with(2, "no data folder")


def test_a_config_file_that_is_missing_or_binary(
    refused: Refused, flat: Path, tmp_path: Path
) -> None:
    refused(2, ("--config", "cannot be read"), flat, "--config", tmp_path / "none.toml")
    refused(2, ("--config", "cannot be read"), flat, "--config", tmp_path)
    refused(1, "not valid TOML", flat, "--config", flat / "ants" / "0.png")


# ---------------------------------------------------------------- runs


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def describe_anew(run: Path, change: Callable[[dict], object]) -> None:
    path = run / "config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def nested(levels: int) -> dict:
    return {"a": nested(levels - 1)} if levels else {}


def drop_a_tensor(run: Path) -> None:
    state = load_file(run / "model.safetensors")
    del state["fc.bias"]
    save_file(state, run / "model.safetensors")


RUNS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no weights": (
        lambda r: (r / "model.safetensors").unlink(),
        ("not a finished run", "model.safetensors"),
    ),
    "no description": (
        lambda r: (r / "config.json").unlink(),
        ("not a finished run", "config.json"),
    ),
    "truncated weights": (
        lambda r: truncate(r / "model.safetensors"),
        ("model.safetensors", "not a whole safetensors file"),
    ),
    "a weight too few": (drop_a_tensor, ("model.safetensors", "fc.bias")),
    "truncated description": (lambda r: truncate(r / "config.json"), ("config.json", "damaged")),
    "binary description": (
        lambda r: (r / "config.json").write_bytes(b"\xff\xfe"),
        ("config.json", "damaged"),
    ),
    "a list for a description": (
        lambda r: (r / "config.json").write_text("[]"),
        ("config.json", "holds no JSON object"),
    ),
    "no classes": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].pop("classes")),
        ("config.json", "classes"),
    ),
    "a class too many": (
        lambda r: describe_anew(r, lambda d: d["cnnft"]["classes"].append("wasps")),
        ("does not fit",),
    ),
    "a newer format": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].update(format=99, version="9.0")),
        ("cnnft 9.0", "update cnnft"),
    ),
    "a description without end": (
        lambda r: describe_anew(r, lambda d: d.update(model_args=nested(100))),
        ("config.json", "nested more than 50 deep"),
    ),
    "brackets without end": (
        lambda r: (r / "config.json").write_text("[" * 100_000 + "]" * 100_000),
        ("config.json", "damaged"),
    ),
    "one class twice": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].update(classes=["ants", "ants"])),
        ("config.json", "classes lists one twice"),
    ),
    "a class that no file can hold": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].update(classes=["ants", "\ud800"])),
        ("config.json", "damaged", "surrogates"),
    ),
    "classes that are no list": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].update(classes="ab")),
        ("config.json", "classes must be a list of strings"),
    ),
    "images of a million pixels a side": (
        lambda r: describe_anew(r, lambda d: d["cnnft"]["input_spec"].update(size=10**6)),
        ("config.json", "size makes no sense"),
    ),
    "a mean of text": (
        lambda r: describe_anew(r, lambda d: d["cnnft"]["input_spec"].update(mean="abc")),
        ("config.json", "mean or std makes no sense"),
    ),
    "a head of an unknown kind": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].update(head_kind="tree")),
        ("config.json", "head_kind is unknown"),
    ),
    "weights from a number": (
        lambda r: describe_anew(r, lambda d: d["cnnft"]["backbone"].update(weights_source=3)),
        ("config.json", "must be strings"),
    ),
    "a much larger network": (
        lambda r: describe_anew(r, lambda d: d["model_args"].update(channels=[2000] * 4)),
        ("config.json", "does not fit the network it names: that holds"),
    ),
    "a network that no memory holds": (
        lambda r: describe_anew(r, lambda d: d["model_args"].update(channels=[10**6] * 4)),
        ("config.json", "do not fit into memory"),
    ),
    "layers without end": (
        lambda r: describe_anew(
            r, lambda d: d.update(architecture="resnet18", model_args={"layers": [10**6, 1, 1, 1]})
        ),
        (
            "config.json",
            "has more than 5,000 tensors",
        ),
    ),
    "a number without end": (
        lambda r: describe_anew(r, lambda d: d["model_args"].update(stem_width=10**12)),
        ("config.json", "larger than 1,000,000"),
    ),
    "an architecture from a hub": (
        lambda r: describe_anew(r, lambda d: d.update(architecture="hf-hub:nobody/nothing")),
        ("config.json", "timm has no classifier 'hf-hub:nobody/nothing'"),
    ),
    "a detector, which would fetch its backbone": (
        lambda r: describe_anew(
            r,
            lambda d: (
                d["cnnft"]["backbone"].update(library="torchvision"),
                d.update(architecture="fasterrcnn_resnet50_fpn", model_args={}),
            ),
        ),
        ("config.json", "torchvision has no classifier"),
    ),
    "an unknown architecture": (
        lambda r: describe_anew(r, lambda d: d.update(architecture="resnet1")),
        ("config.json", "resnet1"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), RUNS.values(), ids=RUNS)
def test_damaged_runs(cnnft: Cli, copied: Path, damage: Damage, parts: tuple[str, ...]) -> None:
    image = next((data_of(copied) / "ants").iterdir())
    damage(copied)
    cnnft("predict", image, "-m", copied).fails_with(1, *parts)
    cnnft("export", copied, "--format", "safetensors").fails_with(1, *parts)
    assert not list(copied.glob("copied*"))


def data_of(run: Path) -> Path:
    """The folder that a run was trained on."""
    first = (run / "data.csv").read_text().splitlines()[1]
    return Path(first.split(",")[2]).parents[1]


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_runs_that_are_not_there(cnnft: Cli, flat: Path, command: str) -> None:
    missing = flat.parent / "nowhere"
    arguments = {
        "predict": (flat, "-m", missing),
        "evaluate": (flat, "-m", missing),
        "export": (missing, "--format", "head"),
    }[command]
    cnnft(command, *arguments).fails_with(2, str(missing), "no such run")


DIFFED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no epoch finished": (lambda r: (r / "metrics.json").unlink(), ("metrics.json",)),
    "no images": (lambda r: (r / "data.csv").unlink(), ("data.csv", "cannot be read")),
    "truncated predictions": (
        lambda r: truncate(r / "predictions.csv"),
        ("predictions.csv", "damaged"),
    ),
    "truncated environment": (
        lambda r: truncate(r / "environment.json"),
        ("environment.json", "is damaged"),
    ),
    "a list for an environment": (
        lambda r: (r / "environment.json").write_text("[]"),
        ("environment.json", "damaged"),
    ),
    "no classes": (
        lambda r: describe_anew(r, lambda d: d["cnnft"].pop("classes")),
        ("config.json", "classes"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), DIFFED.values(), ids=DIFFED)
def test_damaged_runs_cannot_be_compared(
    cnnft: Cli, trained: Path, copied: Path, damage: Damage, parts: tuple[str, ...]
) -> None:
    damage(copied)
    cnnft("diff", trained, copied).fails_with(1, str(copied), *parts)
    cnnft("diff", trained, copied.parent / "nowhere").fails_with(2, "no such run")
    cnnft("diff", data_of(trained), trained).fails_with(2, "not a run")


def test_a_file_that_is_no_model(cnnft: Cli, flat: Path) -> None:
    image = flat / "ants" / "0.png"
    cnnft("predict", image, "-m", image).fails_with(1, str(image), "is no model, it is an image")
    cnnft("predict", image, "-m", BUILTIN).fails_with(1, str(BUILTIN), "not a file that cnnft")


# ---------------------------------------------------------------- predict, evaluate


@pytest.mark.parametrize(
    "flags",
    [("--top", 0), ("--batch-size", 0), ("--workers", -1), ("--tta", "flip"), ("--format", "xml"),
     ("--device", "nonsense")],
)  # fmt: skip
def test_predict_flags(cnnft: Cli, trained: Path, flat: Path, flags: tuple[str, object]) -> None:
    cnnft("predict", flat, "-m", trained, *flags).fails_with(2, flags[0])


def test_predict_without_images_or_without_a_model(cnnft: Cli, trained: Path, flat: Path) -> None:
    assert cnnft("predict", "-m", trained).code == 2
    cnnft("predict", flat).fails_with(2, "--model")


def test_predict_on_what_is_not_there(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "none.jpg", tmp_path / "*.jpg"):
        cnnft("predict", missing, "-m", trained).fails_with(2, str(missing), "no such file")
    cnnft("predict", tmp_path, "-m", trained).fails_with(1, str(tmp_path), "no images")


def test_predict_on_unreadable_files_alone(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", b"no image")
    outcome = cnnft("predict", path, path, "-m", trained, "--json")
    assert outcome.code == 1
    assert [row["file"] for row in json.loads(outcome.out)] == [str(path)] * 2
    assert "none of the 2 file(s) could be read" in outcome.err and "Traceback" not in outcome.err


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.txt"])
def test_predict_output_of_unknown_form(
    cnnft: Cli, trained: Path, flat: Path, tmp_path: Path, name: str
) -> None:
    outcome = cnnft("predict", flat, "-m", trained, "--output", tmp_path / name)
    outcome.fails_with(2, name, "--format")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("{flat}/nowhere",), 2, "no such folder"),
        (("{flat}/ants/0.png",), 2, "is a file"),
        (("{flat}/ants",), 1, "no class folders"),
        (("{flat}", "--split=test"), 2, "no test folder"),
        (("{flat}", "--split=train"), 2, "--split"),
        (("{flat}", "--batch-size=0"), 2, "--batch-size"),
        (("{flat}", "--weights=x.pth"), 2, "--weights"),
    ],
)
def test_evaluate_arguments(
    cnnft: Cli, trained: Path, flat: Path, arguments: tuple[str, ...], code: int, part: str
) -> None:
    filled = [argument.format(flat=flat) for argument in arguments]
    cnnft("evaluate", *filled, "-m", trained).fails_with(code, part)


def test_debug_shows_the_traceback(cnnft: Cli, flat: Path) -> None:
    from cnnft.cli import main
    from cnnft.errors import UsageError

    with pytest.raises(UsageError):
        main(["--debug", "finetune", str(flat / "nowhere")])
    cnnft("finetune", flat / "nowhere").fails_with(2)


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("failure", "parts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ("lower --batch-size",)),
        (MemoryError(), ("out of memory",)),
        (PermissionError(13, "Permission denied", "/photos/x"), ("/photos/x", "Permission denied")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_refuses(
    cnnft: Cli,
    flat: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    parts: tuple[str, ...],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("cnnft.training.plan.prepare", fail)
    cnnft("finetune", flat).fails_with(1, *parts)


def test_a_folder_that_cannot_be_listed(
    refused: Refused, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(path: str | Path = ".") -> object:
        if Path(path).name == "bees":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(1, (str(flat / "bees"), "Permission denied"), flat)


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names are Unicode")
def test_names_that_a_run_could_not_record(refused: Refused, flat: Path) -> None:
    odd = os.fsdecode(b"b\xff")
    shutil.copytree(flat, flat.with_name(odd))
    refused(2, ("data", "is not UTF-8"), flat.with_name(odd))
    (flat / "bees").rename(flat / odd)
    refused(1, ("class folder", "is not UTF-8"), flat)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"architecture": 3}, "a name is no text"),
        ({"model_args": [1]}, "no JSON object"),
        ({"model_args": {"colour": "red"}}, "cannot be built"),
        ({"model_args": {"channels": [10**6] * 4}}, "do not fit into memory"),
        ({"model_args": {"in_chans": 1}}, "cannot be built"),
        ({"pretrained_cfg": {"input_size": [3, 32, "32"]}}, "not a timm model description"),
        ({"pretrained_cfg": {"input_size": 3}}, "not a timm model description"),
        ({"cnnft": {"backbone": {"library": "torchvision"}}}, "torchvision"),
    ],
)
def test_descriptions_of_no_backbone(
    refused: Refused, flat: Path, tmp_path: Path, change: dict, part: str
) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(BUILTIN.parent, folder)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | change))
    refused(1, (str(folder), part), flat, "--backbone", f"local-dir:{folder}")


def test_a_program_is_no_image(cnnft: Cli, trained: Path, flat: Path) -> None:
    program = flat / "ants" / "program.jpg"
    Image.new("RGB", (8, 8)).save(program, "EPS")
    outcome = cnnft("predict", program, "-m", trained)
    assert outcome.code == 1 and "is not an image of a format" in outcome.out


def test_a_head_is_not_fetched_from_where_its_file_says(
    cnnft: Cli, trained: Path, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(remote: Remote) -> None:
        raise DownloadError(f"not from {remote.place}")

    monkeypatch.setattr("cnnft.models.hub.Remote.fetch", fetch)
    description = describe(package.load(trained)) | {"architecture": "test_resnet"}
    description |= {"pretrained_cfg": {"url": "https://example.com/x.pth"}, "model_args": {}}
    name = "test_resnet.r160_in1k"
    description["cnnft"]["backbone"] |= {"name": name, "weights_source": name}
    state = {name: torch.zeros(2) for name in description["cnnft"]["head"]}
    save_file(state, tmp_path / "head.safetensors", {"cnnft": json.dumps(description)})
    image = flat / "ants" / "0.png"
    outcome = cnnft("predict", image, "-m", tmp_path / "head.safetensors")
    outcome.fails_with(1, f"not from timm/{name}")


def test_a_description_may_not_make_timm_read_files(
    refused: Refused, flat: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(BUILTIN.parent, folder)
    description = json.loads((folder / "config.json").read_text())
    description["model_args"] = {"checkpoint_path": "/etc/passwd"}
    (folder / "config.json").write_text(json.dumps(description))
    refused(1, ("may not set checkpoint_path",), flat, "--backbone", f"local-dir:{folder}")


def test_an_interrupted_command_says_so(
    cnnft: Cli, flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cnnft.training.plan.prepare", interrupt)
    cnnft("finetune", flat).fails_with(130, "interrupted")


def test_no_command_shows_the_help_and_no_empty_error(cnnft: Cli) -> None:
    outcome = cnnft()
    assert outcome.code == 2 and "Commands" in outcome.out + outcome.err
    assert "error:" not in outcome.err


# ---------------------------------------------------------------- what a hostile user found


def test_an_export_never_overwrites_the_runs_own_files(cnnft: Cli, copied: Path) -> None:
    before = (copied / "model.safetensors").read_bytes()
    cnnft(
        "export", copied, "--format", "head", "--output", copied / "model.safetensors"
    ).fails_with(2, "one of the run's own files")
    assert (copied / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", ["garbage\n", "split,class,file,sha256\n", None])
def test_a_damaged_list_of_images_does_not_switch_off_the_leak_protection(
    cnnft: Cli, copied: Path, flat: Path, content: str | None
) -> None:
    path = copied / "data.csv"
    path.write_text(path.read_text()[:-40] if content is None else content)
    cnnft("evaluate", flat, "-m", copied).fails_with(1, "data.csv is damaged")


@pytest.mark.parametrize("metrics", ["{}", "[]", '{"train": 3, "val": {"n": 4}}', "{"])
def test_metrics_that_say_nothing(cnnft: Cli, copied: Path, flat: Path, metrics: str) -> None:
    (copied / "metrics.json").write_text(metrics)
    cnnft("evaluate", flat, "-m", copied).fails_with(1, "metrics.json is damaged")


NO_MODELS = {
    "an empty file": (b"", "it is empty"),
    "JSON": (b' {"classes": ["a"]}', "it is a JSON file"),
    "text": ("caf\u00e9 \u2026\n".encode() * 200, "it is a text file"),
    "a web page": (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
    "an archive": (b"PK\x03\x04\x14\x00", "it is a zip archive"),
    "a photograph": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "it is an image"),
}


@pytest.mark.parametrize(("content", "words"), NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_given_as_a_model_is_named(
    cnnft: Cli, flat: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    """ "header too large" was said of JSON, "invalid load key" of a web page."""
    for name in ("model.safetensors", "model.pth", "config.json", "odd\n\x1b[2Jname"):
        written(tmp_path / name, content)
    cnnft("predict", flat, "-m", tmp_path / "model.safetensors").fails_with(1, words)
    cnnft("evaluate", flat, "-m", tmp_path / "odd\n\x1b[2Jname").fails_with(1, words)
    common = ("finetune", flat, "--workers=0", "--runs-dir", tmp_path / "runs", "--epochs=1")
    for name in ("model.safetensors", "model.pth"):
        weights = ("--backbone=test_resnet", "--weights", tmp_path / name)
        reason = (
            "cannot be read as weights (" if name == "model.pth" and b"PK" in content else words
        )
        cnnft(*common, *weights).fails_with(1, reason)
    parts = [words] if b"{" not in content and "text" not in words else ["config.json"]
    cnnft(*common, f"--backbone=local-dir:{tmp_path}").fails_with(1, *parts)
    teacher = ("--backbone=builtin", "--teacher", tmp_path / "model.pth")
    cnnft(*common, *teacher).fails_with(1, words)


def test_folders_and_files_in_each_others_place(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "file", b"")
    common = ("finetune", flat, "--workers=0", "--runs-dir", tmp_path / "runs")
    cnnft(*common, f"--backbone=local-dir:{file}").fails_with(2, "is a file")
    cnnft("predict", flat, "-m", flat).fails_with(1, "is not a finished run")


def test_a_safetensors_header_of_any_length_is_none_of_these() -> None:
    for length in (0x7B, 0x5B, 0x280, 0x8B1F, 0x3C, 0x3C2, 10, 32):
        assert kind_of(length.to_bytes(8, "little") + b'{"__metadata__":{"a":"b"}}') is None


def test_what_libraries_say_commands_no_terminal() -> None:
    error = RuntimeError("\n\x1b[2Jgone\x07 \u202e.\nand more")
    assert first_line(error) == "\\x1b[2Jgone\\x07 \\u202e"


def test_own_weights_beside_a_tag_that_this_timm_does_not_know(
    cnnft: Cli, flat: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "own.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    common = (
        "finetune", flat, "--workers=0", "--runs-dir", tmp_path / "runs", "--dry-run", "--json",
        "--backbone=test_resnet.mine",
    )  # fmt: skip
    outcome = cnnft(*common, "--weights", weights)
    assert outcome.code == 0, outcome.err
    cnnft(*common).fails_with(2, "has no weights 'mine'")


@pytest.mark.parametrize("flags", [("--train-stages=99",)])
def test_what_cannot_train_is_refused_before_the_probe(
    cnnft: Cli, flat: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--workers=0", "--runs-dir", tmp_path / "r", *flags
    )
    outcome.fails_with(2, "--train-stages 99 is out of range")
    assert "probing" not in outcome.err


def test_the_caches_limit_is_read_before_the_data(
    cnnft: Cli, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (flat / "ants" / "0.png").write_bytes(b"no image")
    monkeypatch.setenv("CNNFT_CACHE_LIMIT", "much")
    common = ("finetune", flat, "--backbone=builtin", "--workers=0", "--runs-dir", tmp_path / "r")
    cnnft(*common, "--strict").fails_with(2, "CNNFT_CACHE_LIMIT 'much'")
    cnnft(*common, "--strict", "--cache=off").fails_with(1, "--strict")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CNNFT_CACHE": "/dev/null/x"}, "/dev/null/x cannot be written (Not a directory)"),
        ({"CNNFT_CACHE": "/dev/null"}, "/dev/null is no folder for the cache"),
        ({"CNNFT_CACHE_LIMIT": "0"}, "the cache may have 0.0 MB (CNNFT_CACHE_LIMIT)"),
    ],
)
def test_no_run_is_left_where_the_cache_has_no_room(
    cnnft: Cli, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str], words: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--workers=0", "--runs-dir", tmp_path / "runs",
        "--cache=disk", "--epochs=2", "--no-probe-first",
    )  # fmt: skip
    outcome.fails_with(1, "--cache disk: ", words)
    assert not (tmp_path / "runs").exists()


def test_why_features_are_not_cached_is_said_once(
    cnnft: Cli, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And truly: it was "50% of the free disk is 0.0 MB"."""
    monkeypatch.setenv("CNNFT_CACHE", "/dev/null/x")
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--mode=feature-extractor", "--epochs=1",
        "--workers=0", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("features are not cached for later runs: /dev/null/x cannot be") == 1


@pytest.mark.parametrize("arguments", [{"tta": "HFLIP"}, {"top": 0}, {"batch_size": 0}])
def test_predict_in_python_checks_its_arguments(
    trained: Path, flat: Path, arguments: dict[str, object]
) -> None:
    with pytest.raises(package.CnnftError, match="--"):
        package.load(trained, device="cpu").predict(flat / "ants" / "0.png", **arguments)


def test_predict_in_python_takes_files(trained: Path) -> None:
    model = package.load(trained, device="cpu")
    for given in (Image.new("RGB", (9, 9)), [Image.new("RGB", (9, 9))], None, 3):
        with pytest.raises(package.CnnftError, match=r"forward\(preprocess"):
            model.predict(given)


LOCALES = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="where names are bytes")
def test_a_good_name_in_a_locale_without_it(tmp_path: Path) -> None:
    """ "not UTF-8: rename it" was said of a name that is."""
    for name in ("caf\u00e9", "tea"):
        draw(tmp_path / "good" / name / "0.png", 0, 0)
    draw(tmp_path / "bad" / os.fsdecode(b"caf\xe9") / "0.png", 0, 0)
    draw(tmp_path / "bad" / "tea" / "0.png", 0, 0)
    code = (
        "import sys\nfrom cnnft.data.sources import open_source\n"
        "from cnnft.errors import CnnftError\nfor folder in sys.argv[1:]:\n"
        "    try: print(open_source(folder).classes('train'))\n"
        "    except CnnftError as error: print(ascii(str(error)))\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "good", tmp_path / "bad"],
        env={**os.environ, **LOCALES}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert "rename" not in lines[0] and "set PYTHONUTF8=1, or LC_ALL=C.UTF-8" in lines[0]
    assert "is not UTF-8: rename it" in lines[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image.png")
    outcome = cnnft("predict", tmp_path / "image.png", "-m", trained, "--json")
    assert outcome.code == 1 and "is not a regular file" in outcome.out


def test_a_model_of_nan_is_an_error(cnnft: Cli, copied: Path, flat: Path) -> None:
    state = load_file(copied / "model.safetensors")
    state["fc.bias"] *= float("nan")
    save_file(state, copied / "model.safetensors")
    cnnft("predict", flat, "-m", copied, "--json").fails_with(1, "NaN")


def test_runs_inside_the_data_are_no_class(cnnft: Cli, flat: Path) -> None:
    for _ in range(2):
        outcome = cnnft(
            "finetune", flat, "--backbone=builtin", "--mode=feature-extractor", "--epochs=1",
            "--workers=0", "--runs-dir", flat / "runs",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err


def test_json_with_another_format_is_refused(cnnft: Cli, trained: Path, flat: Path) -> None:
    cnnft("predict", flat, "-m", trained, "--json", "--format", "csv").fails_with(2, "--json")


@pytest.mark.parametrize("arguments", [("predict", "", "-m", "."), ("predict", ".", "-m", "")])
def test_empty_arguments_are_not_the_current_folder(
    cnnft: Cli, flat: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(flat)
    cnnft(*arguments).fails_with(2, "mpty")
