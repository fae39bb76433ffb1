"""The temperature of a classifier: every way of asking it gives softmax(logits / temperature)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import Outcome, draw_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cnnft import finetune, load
from cnnft.analysis.export import export_model
from cnnft.data.images import read_image
from cnnft.models.backbones import open_backbone, with_stages
from cnnft.models.heads import head_tensors, replace_by_mlp
from cnnft.models.surgery.divide import divided

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


@pytest.mark.parametrize("way", WAYS)
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


def test_of_several_views_the_mean_is_divided(
    trained: Path, files: list[Path], tmp_path: Path
) -> None:
    run = with_temperature(trained, T, tmp_path / "run")
    found = load(run, device="cpu").predict(files, tta="hflip", workers=0)
    network, pixels = load(run, device="cpu").network.eval(), pixels_of(run, files)
    with torch.no_grad():
        views = [network(view).softmax(dim=1) for view in (pixels, pixels.flip(3))]
    expected = (torch.stack(views).mean(dim=0).log() / T).softmax(dim=1)
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
