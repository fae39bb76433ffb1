"""A classifier's temperature: its answers have it, training does not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, draw_folder
from torch import Tensor

from cnnft import Config, load
from cnnft.data.images import read_image
from cnnft.runs.run import Run
from cnnft.training.distillation import load_teachers
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]

T = 2.5


@pytest.fixture(scope="module")
def warm(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classifier has the temperature T."""
    run = tmp_path_factory.mktemp("warm") / "run"
    shutil.copytree(trained, run)
    describe(run, T)
    return run


def describe(run: Path, temperature: object) -> None:
    file = run / "config.json"
    described = json.loads(file.read_text())
    described["cnnft"]["temperature"] = temperature
    file.write_text(json.dumps(described))


@pytest.fixture(scope="module")
def expected(warm: Path, images: list[Path]) -> Tensor:
    """(N, C) probabilities, from the raw logits of the network."""
    classifier = load(warm, device="cpu")
    pixels = torch.stack([classifier.preprocess(read_image(path)) for path in images])
    with torch.inference_mode():
        return (classifier.network(pixels) / T).softmax(dim=1)


@pytest.fixture(scope="module")
def images(trained: Path) -> list[Path]:
    return sorted((trained.parents[1] / "data").glob("*/*.png"))[::3]


def ways(cnnft: Cli, run: Path, images: list[Path], way: str, folder: Path) -> np.ndarray:
    """(N, C) probabilities, as one way of asking gives them."""
    classes = load(run).classes
    if way == "forward":
        classifier = load(run, device="cpu")
        pixels = torch.stack([classifier.preprocess(read_image(path)) for path in images])
        with torch.inference_mode():
            return classifier.forward(pixels).softmax(dim=1).numpy()
    if way == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        file = folder / "model.onnx"
        assert cnnft("export", run, "--format=onnx", "--output", file).code == 0
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        described = json.loads(session.get_modelmeta().custom_metadata_map["cnnft"])
        assert described["cnnft"]["temperature"] == 1  # it is in the graph
        pixels = torch.stack([load(run).preprocess(read_image(path)) for path in images])
        (logits,) = session.run(None, {"pixels": pixels.numpy()})
        return torch.from_numpy(logits).softmax(dim=1).numpy()
    model = run
    if way in ("head", "safetensors"):
        model = folder / f"model.{way}.safetensors"
        assert cnnft("export", run, "--format", way, "--output", model).code == 0
    if way == "api":
        answers = [dict(answer.top) for answer in load(model).predict(images)]
    else:
        outcome = cnnft("predict", *images, "-m", model, "--json", "--top=2", "--workers=0")
        rows = json.loads(outcome.out)
        answers = [{of["class"]: of["probability"] for of in row["top"]} for row in rows]
    return np.array([[answer[name] for name in classes] for answer in answers])


@pytest.mark.parametrize("way", ["run", "api", "forward", "head", "safetensors", "onnx"])
def test_every_way_has_the_temperature_once(
    cnnft: Cli, warm: Path, images: list[Path], expected: Tensor, way: str, tmp_path: Path
) -> None:
    found = ways(cnnft, warm, images, way, tmp_path)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def test_evaluation_shows_what_it_does(
    cnnft: Cli, warm: Path, trained: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(trained, raw)
    describe(raw, 1)
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 4, first_seed=900)

    def evaluate(run: Path, *flags: str) -> str:
        return cnnft("evaluate", data, "-m", run, "--workers=0", *flags).out

    with_it, without = (json.loads(evaluate(run, "--json")) for run in (warm, raw))
    assert without["calibration"] is None and "temperature" not in evaluate(raw)
    assert with_it["calibration"] == {
        "temperature": T,
        "loss_before": pytest.approx(without["loss"], abs=1e-6),
        "ece_before": pytest.approx(without["calibration_error"], abs=1e-6),
        "ece": with_it["calibration_error"],
    }
    assert with_it["loss"] != without["loss"]
    shown = f"temperature     2.50: loss {without['loss']:.4f} → {with_it['loss']:.4f}, ECE "
    assert shown in evaluate(warm)
    assert json.loads(evaluate(warm, "--json", "--tta=hflip"))["calibration"] is None


def test_teachers_give_raw_logits(warm: Path, trained: Path) -> None:
    (teacher,) = load_teachers((str(warm),), ("ants", "bees"), "cpu")
    raw = replace(load(trained, device="cpu"), temperature=1.0)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(teacher.forward(pixels), raw.forward(pixels))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "x", 1e9, True, None, [1]])
def test_a_damaged_temperature_is_a_sentence(
    cnnft: Cli, trained: Path, images: list[Path], value: object, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    describe(run, value)
    cnnft("predict", images[0], "-m", run).fails_with(1, "config.json")


def test_a_description_without_one_has_none(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "config.json"
    described = json.loads(file.read_text())
    del described["cnnft"]["temperature"]
    file.write_text(json.dumps(described))
    assert load(run).temperature == 1


def overlapping(folder: Path) -> Path:
    """Classes that cannot be told apart wholly: half of the labels are another's."""
    data = draw_folder(folder / "data", ("ants", "bees"), 16)
    for number in range(0, 16, 4):
        one, other = (data / name / f"{number}.png" for name in ("ants", "bees"))
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
    return data


@pytest.mark.parametrize("mode", ["feature-extractor", "finetune"])
def test_a_run_is_calibrated(mode: str, tmp_path: Path) -> None:
    config = Config.of(
        overlapping(tmp_path), backbone="builtin", mode=mode, epochs=2, batch_size=8, workers=0,
        device="cpu", image_size=32, runs_dir=tmp_path, name="run",
    )  # fmt: skip
    list(run_plan(prepare(config)))
    run = Run.open(tmp_path / "run")
    metrics, predictions = run.metrics(), run.predictions()
    found = metrics.calibration
    assert found is not None and predictions is not None
    assert found.temperature == load(run.path).temperature != 1
    raw = replace(predictions, logits=predictions.logits * found.temperature)
    assert raw.score().loss == pytest.approx(found.loss_before, rel=1e-5)
    assert predictions.score() == metrics.val
    assert metrics.val.loss < found.loss_before
