"""cnnft export: three formats that predict as the run does, or a refusal that writes nothing."""

import errno
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Outcome, assert_alike, draw_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cnnft as package
from cnnft import finetune, load
from cnnft.analysis import export as exporting
from cnnft.data.images import read_image
from cnnft.data.transforms import EvaluationViews

Cli = Callable[..., Outcome]

BUILTIN = Path(package.__file__).parent / "models" / "builtin" / "model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def no_sessions_are_left() -> Iterator[None]:
    """ONNX sessions have threads: processes that are forked later would wait for them."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("images"), ("ants", "bees"), 3, first_seed=200)


@pytest.fixture
def predict(cnnft: Cli, images: Path) -> Callable[..., Any]:
    """What a model says of the images, to the last digit."""

    def run(model: Path, *arguments: object) -> Any:
        outcome = cnnft(
            "predict", images, "-m", model, "--top", 2, "--json", "--workers", 0, *arguments
        )
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


Predict = Callable[..., Any]


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def perturbed(source: Path, target: Path, name: str) -> Path:
    """`source` with one number of one tensor changed a little."""
    state = load_file(source)
    first = state[name].view(-1)[:1]
    first += 0.01 * first.abs() + 1e-3  # enough for half precision
    save_file(state, target)
    return target


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("form", ["head", "safetensors"])
@pytest.mark.parametrize("place", ["into the run", "elsewhere"])
def test_an_exported_file_predicts_as_the_run(
    cnnft: Cli, predict: Predict, copied: Path, tmp_path: Path, form: str, place: str
) -> None:
    elsewhere = tmp_path / "new folder" / "my model.bin"
    arguments = [] if place == "into the run" else ["--output", elsewhere]
    before = listing(copied)
    outcome = cnnft("export", copied, "--format", form, *arguments)
    assert outcome.code == 0
    path = Path(outcome.out.rstrip("\n"))
    suffix = {"head": ".head.safetensors", "safetensors": ".safetensors"}[form]
    if arguments:
        assert path == elsewhere and listing(copied) == before
    else:
        assert path == copied / f"copied{suffix}" and listing(copied) == before | {path.name}
    expected = predict(copied)
    shutil.move(path, tmp_path / "moved.safetensors")
    shutil.rmtree(copied)
    found = predict(tmp_path / "moved.safetensors")
    if form == "head":
        assert found == expected
    assert_alike(found, expected)


def test_json_tells_file_format_and_size(cnnft: Cli, copied: Path) -> None:
    told = json.loads(cnnft("export", copied, "--format", "safetensors", "--json").out)
    path = copied / "copied.safetensors"
    assert told == {"file": str(path), "format": "safetensors", "bytes": path.stat().st_size}


def test_a_finetuned_run_exports_whole(cnnft: Cli, predict: Predict, finetuned: Path,
                                       tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / "whole.safetensors"
    assert cnnft("export", finetuned, "--format", "safetensors", "--output", path).code == 0
    assert_alike(predict(path), predict(finetuned))
    state = load_file(path)
    wanted = load_file(finetuned / "model.safetensors")
    temperature = load(finetuned).temperature
    assert temperature != 1
    for name in ("fc.weight", "fc.bias"):
        wanted[name] /= temperature
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_timm_opens_a_run_and_computes_the_same(finetuned: Path, images: Path) -> None:
    network = timm.create_model(f"local-dir:{finetuned}", pretrained=True).eval()
    classifier = load(finetuned, device="cpu")
    image = read_image(next(images.glob("*/*.png")))
    views = EvaluationViews(classifier.input_spec)(image)
    with torch.inference_mode():
        theirs, ours = network(views)[0], classifier.network(views)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert network.pretrained_cfg["label_names"] == ["ants", "bees"]


@pytest.mark.parametrize("form", ["head", "safetensors", "onnx"])
def test_an_output_that_is_a_folder_is_refused(
    cnnft: Cli, trained: Path, tmp_path: Path, form: str
) -> None:
    before = listing(tmp_path)
    outcome = cnnft("export", trained, "--format", form, "--output", tmp_path)
    outcome.fails_with(2, str(tmp_path), "is a folder")
    assert listing(tmp_path) == before


def test_a_failed_write_leaves_the_old_file(
    cnnft: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("precious")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = cnnft("export", trained, "--format", "safetensors", "--output", path)
    outcome.fails_with(1, str(path), "No space left")
    assert path.read_text() == "precious" and listing(tmp_path) == {path.name}


# ---------------------------------------------------------------- head


def test_a_head_holds_the_head_alone(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    assert cnnft("export", trained, "--format", "head", "--output", path).code == 0
    assert path.stat().st_size < 100_000
    state, run = load_file(path), load_file(trained / "model.safetensors")
    assert state.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(state[name], run[name]) for name in state)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["cnnft"])
    assert described["cnnft"]["classes"] == ["ants", "bees"]


def test_a_finetuned_run_has_no_head_of_its_own(cnnft: Cli, finetuned: Path) -> None:
    before = listing(finetuned)
    outcome = cnnft("export", finetuned, "--format", "head")
    outcome.fails_with(2, f"cnnft export {finetuned} --format safetensors")
    assert listing(finetuned) == before


def test_a_backbone_with_random_tensors_is_found_nowhere_else(
    cnnft: Cli, images: Path, tmp_path: Path
) -> None:
    """Weights files may lack a few tensors; what filled them is in no file."""
    state = load_file(BUILTIN)
    del state["layer1.0.bn1.weight"]
    save_file(state, tmp_path / "most.safetensors")
    shutil.copy(BUILTIN.with_name("config.json"), tmp_path)
    run = finetune(
        images, backbone="resnet10t", weights=tmp_path / "most.safetensors", workers=0, epochs=1,
        mode="feature-extractor", runs_dir=tmp_path / "runs",
    ).path  # fmt: skip
    cnnft("export", run, "--format", "head").fails_with(
        2, "layer1.0.bn1.weight", "--format safetensors"
    )


def test_a_network_that_onnx_cannot_express(
    cnnft: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    cnnft("export", copied, "--format", "onnx").fails_with(
        1, "as ONNX (no such operator)", "--format safetensors"
    )


def test_an_export_into_a_pipe_replaces_nothing(cnnft: Cli, copied: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        received = pool.submit(pipe.read_bytes)
        assert cnnft("export", copied, "--format", "head", "--output", pipe).code == 0
    assert pipe.is_fifo() and load(received_file(tmp_path, received.result())).classes


def received_file(folder: Path, content: bytes) -> Path:
    path = folder / "received.safetensors"
    path.write_bytes(content)
    return path


def test_a_random_backbone_is_found_nowhere_else(cnnft: Cli, images: Path, tmp_path: Path) -> None:
    run = finetune(
        images, backbone="test_resnet", pretrained=False, mode="feature-extractor", epochs=1,
        workers=0, runs_dir=tmp_path,
    ).path  # fmt: skip
    outcome = cnnft("export", run, "--format", "head")
    outcome.fails_with(2, "random backbone", "--format safetensors")


@pytest.mark.parametrize("name", ["bn1.running_mean", "bn1.weight", "layer4.0.conv1.weight"])
def test_a_backbone_that_differs_in_one_number_is_noticed(
    cnnft: Cli, images: Path, trained: Path, copied: Path, tmp_path: Path, name: str
) -> None:
    """In the run, when the head is exported; in the weights, when the head is used."""
    head = tmp_path / "head.safetensors"
    assert cnnft("export", trained, "--format", "head", "--output", head).code == 0
    wrong = perturbed(BUILTIN, tmp_path / "wrong.safetensors", name)
    outcome = cnnft("predict", images, "-m", head, "--weights", wrong)
    outcome.fails_with(1, str(head), "was trained on builtin", "differ", "--weights")
    perturbed(copied / "model.safetensors", copied / "model.safetensors", name)
    outcome = cnnft("export", copied, "--format", "head")
    outcome.fails_with(2, "--format safetensors")
    assert not list(copied.glob("*.head.safetensors"))


def test_a_head_accepts_the_weights_it_was_trained_on(
    cnnft: Cli, predict: Predict, trained: Path, tmp_path: Path
) -> None:
    head, weights = tmp_path / "head.safetensors", tmp_path / "elsewhere.safetensors"
    assert cnnft("export", trained, "--format", "head", "--output", head).code == 0
    shutil.copy(BUILTIN, weights)
    assert predict(head, "--weights", weights) == predict(trained)


@pytest.mark.parametrize("model", ["run", "file"])
def test_weights_go_with_a_head_only(
    cnnft: Cli, trained: Path, images: Path, tmp_path: Path, model: str
) -> None:
    path = trained
    if model == "file":
        path = tmp_path / "whole.safetensors"
        assert cnnft("export", trained, "--format", "safetensors", "--output", path).code == 0
    outcome = cnnft("predict", images, "-m", path, "--weights", BUILTIN)
    outcome.fails_with(2, "--weights goes with a head file only")


def test_a_head_finds_its_weights_file_from_another_directory(
    cnnft: Cli, predict: Predict, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_resnet").state_dict(), "my.safetensors")
    run = finetune(
        images, backbone="test_resnet", weights="my.safetensors", mode="feature-extractor",
        epochs=1, workers=0, runs_dir=tmp_path / "runs",
    ).path  # fmt: skip
    head = tmp_path / "head.safetensors"
    assert cnnft("export", run, "--format", "head", "--output", head).code == 0
    expected = predict(run)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert predict(head) == expected
    (tmp_path / "my.safetensors").rename(tmp_path / "moved.safetensors")
    cnnft("predict", images, "-m", head).fails_with(
        1, "my.safetensors", "not there any more", "--weights"
    )
    assert predict(head, "--weights", tmp_path / "moved.safetensors") == expected


# ---------------------------------------------------------------- onnx


@pytest.fixture(scope="module")
def onnx_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert exporting.export_model(trained, "onnx", path) == path
    return path


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_onnx_computes_the_networks_logits_for_any_batch(
    trained: Path, images: Path, onnx_file: Path, batch: int
) -> None:
    import onnxruntime

    classifier = load(trained, device="cpu")
    pictures = [read_image(path) for path in sorted(images.glob("*/*.png"))[:batch]]
    views = EvaluationViews(classifier.input_spec)
    pixels = torch.cat([views(picture) for picture in pictures]).numpy()
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": pixels})
    with torch.inference_mode():
        expected = classifier.forward(torch.from_numpy(pixels)).numpy()
    assert logits.shape == (batch, 2)
    assert np.abs(logits - expected).max() < 1e-3
    assert np.ptp(expected) > 0.1


def test_onnx_carries_the_description(trained: Path, onnx_file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["cnnft"])
    own = json.loads((trained / "config.json").read_text())
    assert own["cnnft"].pop("temperature") != described["cnnft"].pop("temperature") == 1
    assert described == own
    assert described["cnnft"]["classes"] == ["ants", "bees"]
    (pixels,) = session.get_inputs()
    assert pixels.name == "pixels" and pixels.shape[1:] == [3, 128, 128]
    assert not isinstance(pixels.shape[0], int)


def test_onnx_that_disagrees_is_not_written(
    cnnft: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments: Any) -> Any:
            return [-logits for logits in super().run(*arguments)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    path = tmp_path / "model.onnx"
    path.write_text("precious")
    outcome = cnnft("export", trained, "--format", "onnx", "--output", path)
    outcome.fails_with(1, "disagrees with PyTorch", "--format safetensors")
    assert path.read_text() == "precious" and listing(tmp_path) == {path.name}


def test_onnx_is_checked_on_generated_pixels_when_the_images_are_gone(
    cnnft: Cli, copied: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    text = (copied / "data.csv").read_text()
    (copied / "data.csv").write_text(text.replace(".png,", ".gone.png,"))
    path = tmp_path / "model.onnx"
    outcome = cnnft("export", copied, "--format", "onnx", "--output", path)
    assert outcome.code == 0 and path.is_file(), outcome.err
    assert f"the images of {copied} are gone" in outcome.err
    assert "the ONNX file is checked on generated pixels" in outcome.err


def test_generated_pixels_look_different(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A network that answers the same on all of them would be checked on nothing."""
    classifier = load(copied, device="cpu")
    what, pixels = exporting._example_pixels(classifier, copied)
    assert what == "images of the run" and not caplog.records
    for name, reason in (
        ("data.csv", "data.csv cannot be read"),
        ("config.toml", "which images it was trained on"),
    ):
        (copied / name).unlink()
        what, pixels = exporting._example_pixels(classifier, copied)
        assert what == "generated images" and reason in caplog.records[-1].getMessage()
    assert len(pixels) == exporting.ONNX_IMAGES
    logits = classifier.forward(pixels)
    assert len(logits.unique(dim=0)) == len(pixels) and logits.std(dim=0).min() > 0.01


def test_onnx_without_its_packages_names_what_to_install(
    cnnft: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = cnnft("export", trained, "--format", "onnx", "--output", tmp_path / "x.onnx")
    outcome.fails_with(1, "onnx", "pip install 'cnnft[onnx]'")
    assert listing(tmp_path) == set()
