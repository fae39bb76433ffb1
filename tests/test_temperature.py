"""The temperature of a classifier: every way of asking it gives softmax(logits / temperature)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import Outcome, draw_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import finetune, load
from cnnft.analysis.export import export_model
from cnnft.config.schema import Config
from cnnft.data.images import read_image
from cnnft.metrics import calibration_error
from cnnft.models.backbones import open_backbone, with_stages
from cnnft.models.heads import head_tensors, replace_by_mlp
from cnnft.models.surgery.divide import divided
from cnnft.probe.calibrate import PRIOR, calibrate
from cnnft.training.events import Finished
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]
T = 2.5


def with_temperature(run: Path, temperature: Any, target: Path) -> Path:
    """A copy of the run, and its temperature."""
    shutil.copytree(run, target)
    config = json.loads((target / "config.json").read_text())
    config["cnnft"]["temperature"] = temperature
    (target / "config.json").write_text(json.dumps(config))
    return target


def as_ensemble(run: Path) -> Path:
    """A run whose model is that of two snapshots, which differ."""
    state = load_file(run / "model.safetensors")
    (run / "snapshots").mkdir()
    for number in (1, 2):
        state["fc.weight"] = state["fc.weight"] * number
        save_file(state, run / "snapshots" / f"{number}.safetensors")
    config = json.loads((run / "config.json").read_text())
    config["cnnft"]["snapshots"] = 2
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    return sorted(draw_folder(folder, ("ants", "bees"), 3, first_seed=300).glob("*/*.png"))


def pixels_of(run: Path, files: list[Path]) -> Tensor:
    classifier = load(run, device="cpu")
    return torch.stack([classifier.preprocess(read_image(path)) for path in files])


def by_hand(run: Path, files: list[Path]) -> Tensor:
    """(N, C): of what the network says, or the networks of an ensemble say on the average."""
    network, pixels = load(run, device="cpu").network.eval(), pixels_of(run, files)
    with torch.no_grad():
        return (network(pixels) / T).softmax(dim=1)


def predicted(model: Path, files: list[Path]) -> Tensor:
    found = load(model, device="cpu").predict(files, workers=0)
    return torch.tensor([[dict(one.top)[name] for name in ("ants", "bees")] for one in found])


def of_command(cnnft: Cli, model: Path, files: list[Path]) -> Tensor:
    outcome = cnnft("predict", *files, "-m", model, "--top", 2, "--json", "--workers", 0)
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    tops = [{one["class"]: one["probability"] for one in row["top"]} for row in rows]
    return torch.tensor([[top["ants"], top["bees"]] for top in tops])


def of_forward(run: Path, files: list[Path]) -> Tensor:
    with torch.no_grad():
        return load(run, device="cpu").forward(pixels_of(run, files)).softmax(dim=1)


def of_onnx(run: Path, files: list[Path], target: Path) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export_model(run, "onnx", target / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["cnnft"])
    assert described["cnnft"]["temperature"] == 1
    (logits,) = session.run(None, {"pixels": pixels_of(run, files).numpy()})
    return torch.from_numpy(logits).softmax(dim=1)


def of_timm(run: Path, files: list[Path], target: Path) -> Tensor:
    """The exported file as weights of a program that knows no temperature."""
    path = export_model(run, "safetensors", target / "whole.safetensors")
    assert load(path).temperature == 1
    classifier = load(run, device="cpu")
    identity = classifier.identity
    network = timm.create_model(identity.architecture, num_classes=2, **identity.model_args)
    network.load_state_dict(load_file(path))
    with torch.no_grad():
        return network.eval()(pixels_of(run, files)).softmax(dim=1)


def of_head(run: Path, files: list[Path], target: Path) -> Tensor:
    path = export_model(run, "head", target / "head.safetensors")
    state, whole = load_file(path), load_file(run / "model.safetensors")
    assert all(torch.equal(state[name], whole[name]) for name in state)  # raw
    assert load(path).temperature == T
    return predicted(path, files)


WAYS: dict[str, Callable[[Cli, Path, list[Path], Path], Tensor]] = {
    "run": lambda cnnft, run, files, target: predicted(run, files),
    "command": lambda cnnft, run, files, target: of_command(cnnft, run, files),
    "forward": lambda cnnft, run, files, target: of_forward(run, files),
    "head file": lambda cnnft, run, files, target: of_head(run, files, target),
    "whole file": lambda cnnft, run, files, target: predicted(
        export_model(run, "safetensors", target / "whole.safetensors"), files
    ),
    "whole file in timm": lambda cnnft, run, files, target: of_timm(run, files, target),
    "onnx": lambda cnnft, run, files, target: of_onnx(run, files, target),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "onnx")) for way in WAYS]
)
def test_every_way_divides_by_the_temperature_once(
    cnnft: Cli, trained: Path, files: list[Path], tmp_path: Path, way: str
) -> None:
    run = with_temperature(trained, T, tmp_path / "run")
    found = WAYS[way](cnnft, run, files, tmp_path)
    torch.testing.assert_close(found, by_hand(run, files), rtol=0, atol=1e-5)
    assert found.max() < 0.999  # so that a temperature shows


@pytest.mark.parametrize("way", ["run", "forward", pytest.param("onnx", marks=pytest.mark.slow)])
def test_of_an_ensemble_the_mean_is_divided(
    cnnft: Cli, trained: Path, files: list[Path], tmp_path: Path, way: str
) -> None:
    run = as_ensemble(with_temperature(trained, T, tmp_path / "run"))
    found = WAYS[way](cnnft, run, files, tmp_path)
    torch.testing.assert_close(found, by_hand(run, files), rtol=0, atol=1e-5)
    if way == "run":
        single = with_temperature(trained, T, tmp_path / "single")
        assert (found - predicted(single, files)).abs().max() > 1e-3


def test_of_several_views_the_probabilities_are_averaged(
    trained: Path, files: list[Path], tmp_path: Path
) -> None:
    run = with_temperature(trained, T, tmp_path / "run")
    found = load(run, device="cpu").predict(files, tta="hflip", workers=0)
    network, pixels = load(run, device="cpu").network.eval(), pixels_of(run, files)
    with torch.no_grad():
        views = [(network(view) / T).softmax(dim=1) for view in (pixels, pixels.flip(3))]
    expected = torch.stack(views).mean(dim=0)
    for one, row in zip(found, expected, strict=True):
        assert dict(one.top)["ants"] == pytest.approx(float(row[0]), abs=1e-5)


@pytest.mark.parametrize("temperature", [0, -1, 0.01, 1e9, float("nan"), float("inf"), "x", True,
                                         None, [2]], ids=str)  # fmt: skip
def test_a_damaged_temperature_is_told(
    cnnft: Cli, trained: Path, files: list[Path], tmp_path: Path, temperature: Any
) -> None:
    run = with_temperature(trained, temperature, tmp_path / "run")
    outcome = cnnft("predict", files[0], "-m", run)
    outcome.fails_with(1, str(run / "config.json"), "temperature must be a number from 0.05 to 20")


def test_a_description_without_a_temperature_has_1(trained: Path, tmp_path: Path) -> None:
    run = with_temperature(trained, T, tmp_path / "run")
    assert load(run).temperature == T
    config = json.loads((run / "config.json").read_text())
    del config["cnnft"]["temperature"]
    (run / "config.json").write_text(json.dumps(config))
    assert load(run).temperature == 1


@pytest.mark.parametrize("augment", ["none", "basic"])
def test_a_student_learns_what_its_teacher_says_before_the_temperature(
    trained: Path, tmp_path: Path, augment: str
) -> None:
    """Of cached views, and of those of each step."""
    students = []
    for temperature in (1.0, T):
        teacher = with_temperature(trained, temperature, tmp_path / f"teacher {temperature}")
        run = finetune(
            trained.parents[1] / "data", backbone="builtin", teacher=[str(teacher)], epochs=1,
            image_size=64, augment=augment, mode="feature-extractor", batch_size=6, workers=0,
            runs_dir=tmp_path, name=f"student {temperature}",
        )  # fmt: skip
        students.append(load_file(run.path / "model.safetensors"))
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


# ---------------------------------------------------------------- where it comes from


SMALL = {"backbone": "builtin", "image_size": 64, "batch_size": 6, "workers": 0}
FITTED: dict[str, dict[str, Any]] = {
    "best epoch": {"epochs": 2},
    "start": {"epochs": 1, "lr": 5.0, "head_lr": 50.0, "clip_grad": 1.0},
    "class weights": {"epochs": 1, "class_weights": "balanced", "label_smoothing": 0.3},
    "balanced draw": {"epochs": 1, "sampling": "balanced", "ema": 0.9},
    "swa": {"epochs": 2, "swa": 1},
    "snapshots": {"epochs": 2, "schedule": "cosine-restarts", "snapshots": 2},
    "solved": {"mode": "feature-extractor"},
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("uneven")
    draw_folder(data, ("ants", "bees"), 8)
    draw_folder(data, ("ants",), 12, first_seed=50)
    return data


@pytest.mark.parametrize("how", FITTED)
def test_it_is_fitted_to_what_the_kept_model_says_of_images_it_was_not_fitted_on(
    uneven: Path, tmp_path: Path, how: str
) -> None:
    """Each image weighs the same, whatever the classes weighed in training."""
    run = finetune(uneven, runs_dir=tmp_path, val_fraction=0.4, **SMALL, **FITTED[how])
    kept, metrics = run.predictions(), run.metrics()
    assert kept is not None and metrics.calibration is not None
    expected = calibrate(kept.logits, kept.labels, prior=PRIOR)
    assert expected.temperature != 1
    assert run.description().temperature == kept.temperature == expected.temperature
    found = metrics.calibration
    assert found.temperature == expected.temperature
    assert found.uncalibrated.loss == pytest.approx(expected.loss_before, abs=1e-6)
    assert found.calibrated.loss == metrics.val.loss == pytest.approx(expected.loss, abs=1e-6)
    assert metrics.val.loss <= found.uncalibrated.loss
    said = load(run.path, device="cpu").predict(kept.samples.paths, workers=0)
    if kept.role == "val":
        of_first = [dict(one.top)["ants"] for one in said]
        assert of_first == pytest.approx(kept.log_probs[:, 0].exp().tolist(), abs=1e-4)


def test_the_end_of_training_and_evaluate_tell_it(cnnft: Cli, uneven: Path, tmp_path: Path) -> None:
    outcome = cnnft("finetune", uneven, "--backbone=builtin", "--image-size=64", "--epochs=1",
                    "--workers=0", "--runs-dir", tmp_path, "--json")  # fmt: skip
    told = json.loads(outcome.out)
    val, run = told["val"], told["run"]
    before = val["uncalibrated"]
    line = next(text for text in outcome.err.splitlines() if text.startswith("calibrated on"))
    assert line == (
        f"calibrated on 4 val images: temperature {val['temperature']:.3g}, log-loss "
        f"{before['loss']:.3f} -> {val['loss']:.3f}, "
        f"ECE {before['calibration_error']:.1%} -> {val['calibration_error']:.1%}"
    )
    assert val["temperature"] != 1
    found = json.loads(cnnft("evaluate", uneven, "-m", run, "--json", "--workers=0").out)
    for name in ("temperature", "loss", "calibration_error"):
        assert found[name] == pytest.approx(val[name], abs=1e-4)
    assert found["uncalibrated"] == pytest.approx(before, abs=1e-4)
    text = cnnft("evaluate", uneven, "-m", run, "--workers=0").out
    assert (
        f"temperature     {val['temperature']:.3g} (without it: mean loss {before['loss']:.2f}"
        in text
    )


def test_training_goes_on_as_if_there_were_no_temperature(uneven: Path, tmp_path: Path) -> None:
    """Of a run that has ended with one, which more epochs are added to."""
    config = Config.of(uneven, runs_dir=tmp_path, epochs=3, name="whole", **SMALL)
    *_, whole = run_plan(prepare(config))
    first = config.replace(epochs=1, name="extended")
    *_, event = run_plan(prepare(first))
    assert isinstance(event, Finished) and isinstance(whole, Finished)
    run = event.run
    described = json.loads((run.path / "config.json").read_text())
    assert described["cnnft"]["temperature"] != 1
    described["cnnft"]["temperature"] = T
    (run.path / "config.json").write_text(json.dumps(described))
    for _ in run_plan(prepare(first.replace(epochs=3), run), run):
        pass
    for name in ("model.safetensors", "config.json", "metrics.json", "predictions.csv"):
        assert (run.path / name).read_bytes() == (whole.run.path / name).read_bytes(), name


@pytest.mark.parametrize(("n", "prior"), [(10, PRIOR), (200, PRIOR), (200, 0.0), (30, 100.0)])
def test_it_is_the_best_of_a_grid(n: int, prior: float) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = 6 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / 3).softmax(dim=1), 1, generator=generator)[:, 0]
    grid = torch.logspace(-1.3, 1.3, 2000, base=10, dtype=torch.float64)
    costs = [
        cross_entropy(logits / t, labels, reduction="sum") + prior * (1 / t - 1 + t.log())
        for t in grid
    ]
    best = float(grid[torch.stack(costs).argmin()])
    assert calibrate(logits, labels, prior=prior).temperature == pytest.approx(best, rel=2e-3)


def test_few_images_that_are_all_right_make_nothing_certain() -> None:
    logits = 4.0 * torch.eye(3).repeat(4, 1)
    labels = torch.arange(3).repeat(4)
    assert calibrate(logits, labels).temperature < 0.2
    assert 0.75 < calibrate(logits, labels, prior=PRIOR).temperature < 1
    wrong = calibrate(logits, (labels + 1) % 3, prior=PRIOR).temperature
    assert 4 < wrong <= 20


@pytest.mark.parametrize("fitted_on", [100, 400])
def test_it_makes_probabilities_as_sure_as_they_are_right(fitted_on: int) -> None:
    """Of logits that are twice too large. Even a perfectly calibrated classifier shows an error on
    as few images as there are.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        logits = 6 * torch.randn(n, 5, generator=generator)
        return logits, torch.multinomial((logits / 2).softmax(dim=1), 1, generator=generator)[:, 0]

    found, perfect, before = [], [], []
    for _ in range(20):
        temperature = calibrate(*draw(fitted_on), prior=PRIOR).temperature
        logits, labels = draw(300)
        for errors, divisor in ((found, temperature), (perfect, 2.0), (before, 1.0)):
            errors.append(calibration_error((logits / divisor).log_softmax(dim=1), labels))
    assert fmean(found) < fmean(perfect) + 0.02 < fmean(before)


# ---------------------------------------------------------------- in the weights


def _linear() -> tuple[nn.Module, frozenset[str], int]:
    backbone = open_backbone("builtin", 3)
    return backbone.network, backbone.head, 64


def _mlp() -> tuple[nn.Module, frozenset[str], int]:
    network, head, size = _linear()
    return network, replace_by_mlp(network, head), size


def _stages() -> tuple[nn.Module, frozenset[str], int]:
    staged = with_stages(open_backbone("builtin", 3))
    assert staged is not None
    nn.init.normal_(staged.network.get_submodule("fc.linear").weight)
    return staged.network, staged.head, 64


def _convolution() -> tuple[nn.Module, frozenset[str], int]:
    """Its logits are a convolution's, activated and averaged."""
    network = torchvision.models.squeezenet1_1(num_classes=3)
    return network, frozenset({"classifier.1.weight", "classifier.1.bias"}), 64


def _averaged_heads() -> tuple[nn.Module, frozenset[str], int]:
    def build(classes: int) -> nn.Module:
        return timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=classes
        )

    network = build(3)
    return network, head_tensors(network, build), 32


HEADS: dict[str, Callable[[], tuple[nn.Module, frozenset[str], int]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "stages": _stages,
    "convolution": _convolution,
    "averaged heads": _averaged_heads,
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_divided_in_the_weights_of_the_head(head: str) -> None:
    torch.manual_seed(0)
    network, names, size = HEADS[head]()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = divided(network, names, T, size)
    assert found is not None and found.state_dict().keys() == before.keys()
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        logits = network.eval()(pixels)
        torch.testing.assert_close(found.eval()(pixels), logits / T, rtol=1e-4, atol=1e-6)
    assert logits.abs().max() > 1e-3
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert name in names or torch.equal(found.state_dict()[name], tensor)


class _Bounded(nn.Module):
    """Whose logits no weight can divide."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.tanh(self.fc(pixels.mean(dim=(2, 3))))


def test_what_no_weight_can_divide_keeps_its_temperature_in_the_file(
    trained: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    assert divided(_Bounded(), frozenset({"fc.weight", "fc.bias"}), T, 32) is None
    monkeypatch.setattr("cnnft.analysis.export.divided", lambda *arguments: None)
    run = with_temperature(trained, T, tmp_path / "run")
    path = export_model(run, "safetensors", tmp_path / "whole.safetensors")
    assert load(path).temperature == T and "by the temperature 2.5" in caplog.text
    torch.testing.assert_close(predicted(path, files), by_hand(run, files), rtol=0, atol=1e-5)


def test_divided_by_1_nothing_changes(trained: Path, tmp_path: Path) -> None:
    run = with_temperature(trained, 1, tmp_path / "run")
    state = load_file(export_model(run, "safetensors", tmp_path / "whole.safetensors"))
    kept = load_file(run / "model.safetensors")
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
