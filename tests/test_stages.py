"""A head on several stages does all that another head does."""

import copy
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Outcome, assert_alike, draw_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cnnft import finetune, load
from cnnft.analysis.export import export_model
from cnnft.cache.features import FeatureExtractor, Features
from cnnft.cache.views import evaluation_view_set
from cnnft.data.dataset import Samples
from cnnft.data.images import read_image
from cnnft.data.loading import ImageFiles, Loading
from cnnft.data.reading import read_dataset
from cnnft.data.viewsets import ViewSet
from cnnft.errors import CnnftError
from cnnft.models.backbones import Backbone, open_backbone, with_stages
from cnnft.models.freezing import freeze
from cnnft.models.surgery.cut import find_cut
from cnnft.models.surgery.embed import find_embedding, pooled
from cnnft.models.surgery.fold import folded
from cnnft.models.surgery.stagehead import head_stages, put_on_stages, stage_cut
from cnnft.models.weights import backbone_hash
from cnnft.probe.probe import install
from cnnft.probe.solve import Linear
from cnnft.runs.run import Run
from cnnft.training.network import open_network

Cli = Callable[..., Outcome]

# Architecture -> (side in pixels, the modules that its head is put on and their widths).
QUICK = {
    "builtin": (64, {"layer3": 128}),
    "mobilenetv2_100": (64, {"blocks.4": 96, "blocks.6": 320}),
    "torchvision/mobilenet_v2": (64, {"features.13": 96, "features.17": 320}),
    "vit_tiny_patch16_224": (32, {"blocks.10": 192, "blocks.11": 192}),
}
SLOW = {
    "resnet18": (64, {"layer3": 256}),
    "convnext_atto": (64, {"stages.2": 160, "stages.3": 320}),
    "densenet121": (64, {"features.transition2": 256, "features.denseblock4": 1024}),
    "vgg11_bn": (64, {"features.26": 512}),
    "mobilenetv3_small_050": (64, {"blocks.5": 288}),
    "regnety_002": (64, {"s3": 152}),
    "swin_tiny_patch4_window7_224": (224, {"layers.2": 384, "layers.3": 768}),
    "mixer_s32_224": (224, {"blocks.6": 512, "blocks.7": 512}),
    "coatnet_nano_rw_224": (224, {"stages.2": 256, "stages.3": 512}),
    "vit_tiny_r_s16_p8_224": (224, {"blocks.10": 192, "blocks.11": 192}),
    "convmixer_768_32": (64, {"blocks.30": 768}),
    "torchvision/swin_t": (64, {"features.5": 384, "features.7": 768}),
    "torchvision/inception_v3": (96, {"Mixed_6e": 768, "Mixed_7b": 2048}),
}  # fmt: skip
SAMPLE = [
    *(pytest.param(name, *row, id=name) for name, row in QUICK.items()),
    *(pytest.param(name, *row, id=name, marks=pytest.mark.slow) for name, row in SLOW.items()),
]


def opened(name: str, size: int, classes: int = 5) -> Backbone:
    backbone = open_backbone(name, classes, pretrained=name == "builtin", image_size=size)
    backbone.network.eval()
    return backbone


def staged(name: str = "builtin", size: int = 64, classes: int = 5) -> Backbone:
    found = with_stages(opened(name, size, classes))
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "size", "widths"), SAMPLE)
def test_the_head_is_on_the_last_stages_and_on_what_entered_it(
    name: str, size: int, widths: dict[str, int]
) -> None:
    plain = opened(name, size)
    before, names = plain.network, set(plain.network.state_dict())
    backbone = with_stages(plain)
    assert backbone is not None and plain.network is before
    assert set(before.state_dict()) == names and not any(
        module._forward_hooks for module in before.modules()
    )
    network = backbone.network.eval()
    assert head_stages(network) == tuple(widths) and head_stages(before) == ()
    place = stage_cut(network).first.removesuffix(".unit")
    assert {f"{place}.linear.weight", f"{place}.linear.bias"} <= backbone.head
    assert names - plain.head == set(network.state_dict()) - backbone.head
    assert backbone_hash(network, backbone.head) == backbone_hash(before, plain.head)
    pixels = torch.randn(3, 3, size, size)
    seen: dict[str, Tensor] = {}
    for path in widths:
        before.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, path=path: seen.update({path: pooled(output)})
        )
    with torch.no_grad():
        last = find_embedding(before, plain.head, size)(before, pixels)
        before(pixels)
        blocks = [*seen.values(), last]
        assert [block.shape[1] for block in blocks[:-1]] == list(widths.values())
        raw = stage_cut(network).activations(network, pixels)
        torch.testing.assert_close(raw, torch.cat(blocks, dim=1), rtol=1e-5, atol=1e-5)
        layer = network.get_submodule(f"{place}.linear")
        unit = torch.cat([F.normalize(block, dim=1) for block in blocks], dim=1)
        logits = network(pixels)
        torch.testing.assert_close(logits, layer(unit), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            find_embedding(network, backbone.head, size)(network, pixels), unit, rtol=1e-4,
            atol=1e-5,
        )  # fmt: skip
        assert torch.equal(copy.deepcopy(network)(pixels), logits)
        torch.testing.assert_close(folded(network, size)(pixels), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",  # two heads
        "torchvision/squeezenet1_1",  # a convolution
        "resnetv2_50x1_bit",  # the same in timm
        pytest.param("torchvision/maxvit_t", marks=pytest.mark.slow),  # no bias
        pytest.param("tnt_s_patch16_224", marks=pytest.mark.slow),  # tokens of parts of images
    ],
)
def test_where_there_is_none_it_says_so(name: str) -> None:
    assert with_stages(opened(name, 224 if name[0] == "t" else 32)) is None


def test_maps_with_the_channels_last_are_pooled_over_their_places() -> None:
    maps = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(pooled(maps.permute(0, 2, 3, 1)), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(pooled(maps), maps.mean(dim=(2, 3)))


class Kept(nn.Module):
    """A stage whose output ends in the very layers that folding joins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(6, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.last(self.norm(self.conv(pixels)).relu_()).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("path", ["conv", "norm"])
def test_what_a_head_looks_at_is_not_folded(path: str) -> None:
    network = Kept().eval()
    assert network.norm.running_mean is not None
    network.norm.running_mean.normal_()
    plain, head = network, frozenset({"fc.weight", "fc.bias"})
    network, head = put_on_stages(plain, head, [path], 16)
    for name, tensor in network.state_dict().items():
        if name in head:
            nn.init.normal_(tensor)
    pixels = torch.randn(3, 3, 16, 16)
    assert torch.equal(folded(network.eval(), 16)(pixels), network(pixels))
    assert isinstance(folded(plain, 16).get_submodule("norm"), nn.Identity)


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["nowhere"], "is not there"),
        (["layer1..0"], "is not there"),
        (["layer1", "layer1"], "listed twice"),
        ([""], "is no stage"),
        (["fc"], "is no stage"),
        (["fc.weight"], "is not there"),
    ],
)
def test_stages_that_make_no_sense(paths: list[str], reason: str) -> None:
    backbone = opened("builtin", 64)
    with pytest.raises(ValueError, match=reason):
        put_on_stages(backbone.network, backbone.head, paths, 64)


def test_no_cut_lies_between_a_stage_and_the_head() -> None:
    """What is fed in there would lack the stage's output, though an earlier pass left one."""
    backbone = staged()
    network = backbone.network
    freeze(network, backbone.head, backbone.stages, "finetune", 1)
    assert find_cut(network, 64) is None
    freeze(network, backbone.head, backbone.stages, "feature-extractor")
    cut = find_cut(network, 64)
    assert cut is not None and cut.first == "fc.linear"


def test_gradients_reach_pixels_and_the_head() -> None:
    network = staged().network
    pixels = torch.randn(2, 3, 64, 64, requires_grad=True)
    stage_cut(network).activations(network, pixels)
    copied = copy.deepcopy(network)  # though the pass was cut short, in a graph
    copied(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.any()
    assert copied.get_parameter("fc.linear.weight").grad is not None


# ---------------------------------------------------------------- features


def computed(backbone: Backbone, samples: Samples, mirrored: bool = False) -> Features:
    network, spec = backbone.network, backbone.input_spec
    extractor = FeatureExtractor(network, stage_cut(network), backbone.identity, "weights")
    views = evaluation_view_set(
        samples, spec, ImageFiles(samples.paths, crop=spec), Loading(8, 0), "images", mirrored
    )
    return Features(extractor.folded(spec.size, backbone.head), views, on_disk=True)


def test_features_of_stages_and_of_mirror_images_are_cached(flat: Path) -> None:
    backbone, samples = staged(), read_dataset(flat, ("train",)).train
    network = backbone.network.eval()
    pixels = torch.stack(
        [ViewSet(backbone.input_spec, "hflip")(read_image(p)) for p in samples.paths]
    )
    for view, mirrored in enumerate((False, True)):
        features = computed(backbone, samples, mirrored)
        assert len(features.missing) == 20
        list(features.compute())
        assert not computed(backbone, samples, mirrored).missing
        with torch.no_grad():
            expected = stage_cut(network).activations(network, pixels[:, view])
        torch.testing.assert_close(features.values, expected, rtol=1e-4, atol=1e-5)
    network, head = put_on_stages(*plain_head(), ["layer2"], 64)
    fewer = replace(backbone, network=network, head=head)
    assert len(computed(fewer, samples).missing) == 20  # the same weights, cut at the same place


def plain_head() -> tuple[nn.Module, frozenset[str]]:
    backbone = opened("builtin", 64)
    return backbone.network, backbone.head


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module", autouse=True)
def put_on_stages_in_training() -> Iterator[None]:
    """Every run of these tests has its head on stages."""

    def open_staged(*arguments: Any) -> Backbone:
        backbone = with_stages(open_network(*arguments))
        assert backbone is not None
        return backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnft.training.network.open_network", open_staged)
        yield
    gc.collect()  # sessions of ONNX have threads


SETTINGS: dict[str, Any] = {
    "mode": "feature-extractor", "epochs": 2, "workers": 0, "head_lr": 0.5, "image_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data"), ("ants", "bees"), 10)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return finetune(data, backbone="builtin", runs_dir=folder, name="staged", **SETTINGS).path


@pytest.fixture
def predict(cnnft: Cli, data: Path) -> Callable[[Path], Any]:
    def say(model: Path) -> Any:
        outcome = cnnft("predict", data, "-m", model, "--top", 2, "--json", "--workers", 0)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return say


def test_a_run_trains_its_head_alone_and_opens_again(run: Path, data: Path) -> None:
    classifier = load(run, device="cpu")
    assert classifier.stages == ("layer3",) == head_stages(classifier.network)
    assert classifier.head == {"fc.linear.weight", "fc.linear.bias"}
    assert backbone_hash(classifier.network, classifier.head) == classifier.pretrained_hash
    found = Run.open(run)
    assert found.metrics().val.accuracy > 0.9
    kept = found.predictions()
    assert kept is not None
    pixels = torch.stack([classifier.preprocess(read_image(p)) for p in kept.samples.paths])
    with torch.no_grad():
        logits = classifier.forward(pixels)
        torch.testing.assert_close(logits, kept.logits, rtol=1e-3, atol=1e-4)
        embedded = classifier.embed(pixels)
        layer = classifier.network.get_submodule("fc.linear")
        torch.testing.assert_close(layer(embedded) / classifier.temperature, logits)
    for block in embedded.split([128, 256], dim=1):
        torch.testing.assert_close(block.norm(dim=1), torch.ones(len(block)))


def test_a_fitted_classifier_can_be_its_head(run: Path) -> None:
    classifier = load(run, device="cpu")
    linear = Linear(torch.randn(2, 384), torch.randn(2))
    install(classifier.network, classifier.head, linear)
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        found, embedded = classifier.forward(pixels), classifier.embed(pixels)
    torch.testing.assert_close(
        found, (linear(embedded) / classifier.temperature).float(), rtol=1e-4, atol=1e-4
    )


def test_it_is_opened_without_looking_for_the_head(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description names it; whoever predicts one image waits for each network that is built."""
    built: list[str] = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, **o: built.append(n) or create(n, **o))
    load(run)
    assert len(built) == 2  # the size of the first is looked at, on the meta device


@pytest.mark.parametrize("form", ["head", "safetensors"])
def test_files_predict_as_the_run(
    run: Path, predict: Callable[[Path], Any], tmp_path: Path, form: Any
) -> None:
    path = export_model(run, form, tmp_path / "model.safetensors")
    assert_alike(predict(path), predict(run))
    if form == "head":
        assert predict(path) == predict(run)
        assert load_file(path).keys() == load(path, device="cpu").head
        assert path.stat().st_size < 20_000


def test_a_head_file_of_a_timm_network_checks_its_backbone(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv2_050", num_classes=0).state_dict(), weights)
    run = finetune(
        data, backbone="mobilenetv2_050", weights=str(weights), runs_dir=tmp_path, **SETTINGS
    ).path
    path = export_model(run, "head", tmp_path / "head.safetensors")
    one, other = load(run, device="cpu"), load(path, device="cpu")
    assert one.stages == other.stages == ("blocks.4", "blocks.6")
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(one.forward(pixels), other.forward(pixels))
    state = load_file(weights)
    state["conv_stem.weight"][0, 0, 0, 0] += 1
    save_file(state, tmp_path / "others.safetensors")
    with pytest.raises(CnnftError, match="these weights differ"):
        load(path, weights=tmp_path / "others.safetensors")


def test_it_can_be_traced_into_a_graph() -> None:
    """What ONNX files are made of."""
    network = staged().network.eval()
    pixels = torch.randn(3, 3, 64, 64)
    graph = torch.export.export(
        network, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    with torch.no_grad():
        torch.testing.assert_close(graph(pixels), network(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_computes_the_same(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export_model(run, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = torch.randn(3, 3, 64, 64)
    (logits,) = session.run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = load(run, device="cpu").forward(pixels)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)


def test_it_teaches(run: Path, data: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "teacher": [str(run)], "distill_weight": 1.0}
    student = finetune(data, backbone="builtin", runs_dir=tmp_path, **settings).path
    assert Run.open(student).metrics().val.accuracy > 0.9


def test_a_run_that_was_stopped_goes_on(cnnft: Cli, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copied")
    outcome = cnnft("finetune", "--resume", tmp_path / "copied", "--epochs", 3)
    assert outcome.code == 0, outcome.err
    assert len(Run.open(tmp_path / "copied").history()) == 3
    assert load(tmp_path / "copied", device="cpu").stages == ("layer3",)


def test_two_runs_that_differ_in_it_say_so(
    cnnft: Cli, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnft.training.network.open_network", open_network)
    plain = finetune(data, backbone="builtin", runs_dir=tmp_path, **SETTINGS).path
    outcome = cnnft("diff", run, plain)
    assert outcome.code == 0 and "head on stages" in outcome.out and "layer3" in outcome.out


def test_another_library_does_not_take_it_for_its_own(run: Path) -> None:
    """It has no place for such a head, and would be silent about a random one."""
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        timm.create_model(f"local-dir:{run}", pretrained=True)
    backbone = open_backbone(f"local-dir:{run}", 3)
    assert backbone.weights is not None and not backbone.weights.missing


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stages": "layer3"}, "stages must be a list of strings"),
        ({"stages": [3]}, "stages must be a list of strings"),
        ({"stages": ["layer3"] * 2}, "stages lists one twice"),
        ({"stages": ["layer3"], "head_kind": "mlp"}, "a head on stages is linear"),
        ({"stages": ["layer9"]}, "layer9"),
        ({"stages": ["fc"]}, "is no stage"),
        ({"stages": []}, "does not fit the network it names"),
        ({"stages": ["layer2"]}, "does not fit the network it names"),
        ({"stages": [f"layer{n}.{m}.norm1" for n in range(1, 5) for m in range(99)]}, "not there"),
    ],
)
def test_hostile_stages_are_refused(
    cnnft: Cli, run: Path, data: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(run / "model.safetensors", damaged)
    description = json.loads((run / "config.json").read_text())
    description["cnnft"].update(settings)
    (damaged / "config.json").write_text(json.dumps(description))
    cnnft("predict", data, "-m", damaged).fails_with(1, str(damaged), reason)
