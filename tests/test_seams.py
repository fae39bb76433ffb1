"""What everything later stands on: preprocess, forward, embed, and one assembly of predictions."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_folder
from torch import Tensor, nn

from cnnft import Config, finetune, load
from cnnft.analysis.evaluate import Seen, evaluate
from cnnft.analysis.export import export_model
from cnnft.data.dataset import Dataset, Samples
from cnnft.data.images import read_image
from cnnft.data.reading import read_dataset
from cnnft.errors import CnnftError
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import Ensemble, Inference, predict
from cnnft.models.backbones import open_backbone
from cnnft.models.build import at_size, build
from cnnft.models.heads import head_tensors, initialise, replace_by_mlp
from cnnft.models.identity import Identity, input_spec
from cnnft.models.registry import resolve
from cnnft.models.surgery.embed import find_embedding, find_head
from cnnft.runs.run import Run
from cnnft.training.distillation import make_soft_targets
from cnnft.training.events import Finished
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

# Architecture -> (side in pixels, the paths of the layers that make its logits).
QUICK = {
    "resnet10t": (32, ["fc"]),
    "mobilenetv3_small_050": (32, ["classifier"]),
    "convnext_atto": (32, ["head.fc"]),
    "regnetx_002": (32, ["head.fc"]),
    "levit_128s": (224, ["head", "head_dist"]),
    "vit_tiny_patch16_224": (32, ["head"]),
    "deit_tiny_distilled_patch16_224": (32, ["head", "head_dist"]),
    "torchvision/squeezenet1_1": (32, ["classifier.1"]),
    "torchvision/shufflenet_v2_x0_5": (32, ["fc"]),
    "torchvision/mobilenet_v2": (32, ["classifier.1"]),
}
SLOW = {
    "efficientnet_lite0": (64, ["classifier"]),
    "densenet121": (64, ["classifier"]),
    "vgg11": (64, ["head.fc"]),
    "swin_tiny_patch4_window7_224": (224, ["head.fc"]),
    "inception_v3": (96, ["fc"]),
    "resnetv2_50": (64, ["head.fc"]),
    "ghostnet_100": (64, ["classifier"]),
    "mobilenetv4_conv_small": (64, ["classifier"]),
    "efficientvit_b0": (64, ["head.classifier.4"]),
    "fastvit_t8": (64, ["head.fc"]),
    "crossvit_tiny_240": (240, ["head.0", "head.1"]),
    "xcit_nano_12_p16_224": (64, ["head"]),
    "visformer_tiny": (224, ["head"]),
    "torchvision/alexnet": (64, ["classifier.6"]),
    "torchvision/vgg11": (64, ["classifier.6"]),
    "torchvision/densenet121": (64, ["classifier"]),
    "torchvision/googlenet": (64, ["fc"]),
    "torchvision/inception_v3": (96, ["fc"]),
    "torchvision/convnext_tiny": (64, ["classifier.2"]),
    "torchvision/vit_b_16": (32, ["heads.head"]),
    "torchvision/swin_t": (64, ["head"]),
    "torchvision/regnet_x_400mf": (64, ["fc"]),
    "torchvision/mobilenet_v3_small": (64, ["classifier.3"]),
    "torchvision/mnasnet0_5": (64, ["classifier.1"]),
}
SAMPLE = [
    *(pytest.param(name, *row, id=name) for name, row in QUICK.items()),
    *(pytest.param(name, *row, id=name, marks=pytest.mark.slow) for name, row in SLOW.items()),
]


def opened(name: str, size: int) -> Classifier:
    """With random weights, and an image size of its own."""
    torch.manual_seed(0)
    identity = resolve(name)
    if size != input_spec(identity).size:
        identity = at_size(identity, size)
    network = build(identity, 5)
    head = head_tensors(network, lambda classes: build(identity, classes))
    initialise(network, head, "default")  # some begin with zeros
    return classifier_of(network, head, identity, size)


def classifier_of(
    network: nn.Module, head: frozenset[str], identity: Identity, size: int
) -> Classifier:
    from cnnft.data.transforms import InputSpec

    spec = InputSpec(size, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return Classifier(
        network=network, classes=tuple("abcde"), input_spec=spec, identity=identity, head=head,
        head_kind="linear", weights_source=None, missing=(), pretrained_hash="",
    )  # fmt: skip


def entering(network: nn.Module, paths: list[str], pixels: Tensor) -> Tensor:
    """The oracle: what hooks see, pooled; of several heads the mean, or of all widths all."""
    seen: list[Tensor] = []
    hooks = [
        network.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for path in paths
    ]
    network(pixels)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(paths)
    rows = [
        features.flatten(2).mean(dim=2) if features.ndim == 4 else features for features in seen
    ]
    alike = len({row.shape for row in rows}) == 1
    return torch.stack(rows).mean(dim=0) if alike else torch.cat(rows, dim=1)


@pytest.mark.parametrize(("name", "size", "paths"), SAMPLE)
def test_embed_is_what_enters_the_head(name: str, size: int, paths: list[str]) -> None:
    classifier = opened(name, size)
    network = classifier.network.eval()
    place = find_head(network, classifier.head, size)
    assert place is not None and list(place.paths) == paths
    layer = network.get_submodule(paths[0])
    assert place.linear == (isinstance(layer, nn.Linear) and len(paths) == 1)
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = entering(network, paths, pixels)
        found = classifier.embed(pixels)
        if place.linear:
            torch.testing.assert_close(
                layer(found), classifier.forward(pixels), rtol=1e-4, atol=1e-5
            )
    assert found.ndim == 2 and expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "size", "paths"), SAMPLE)
def test_looking_changes_nothing_and_gradients_reach_the_pixels(
    name: str, size: int, paths: list[str]
) -> None:
    classifier = opened(name, size)
    network = classifier.network.train()
    for position, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(position % 2 == 0)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    trained = [parameter.requires_grad for parameter in network.parameters()]
    for look in (classifier.embed, classifier.forward):
        gradients = []
        for _ in range(2):
            pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
            pixels.requires_grad_()
            look(pixels).square().sum().backward()
            assert pixels.grad is not None and pixels.grad.abs().sum() > 0
            gradients.append(pixels.grad)
        assert torch.equal(*gradients)  # nothing is drawn
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == trained
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_embed_of_an_mlp_head_and_of_networks_that_vote() -> None:
    classifier = opened("resnet10t", 32)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = classifier.embed(pixels)
        head = replace_by_mlp(classifier.network, classifier.head)
        mlp = classifier_of(classifier.network, head, classifier.identity, 32)
        assert torch.equal(mlp.embed(pixels), plain)
        other = opened("resnet10t", 32).network
        nn.init.constant_(other.conv1[0].weight, 0.1)
        voting = classifier_of(
            Ensemble([opened("resnet10t", 32).network, other]),
            classifier.head, classifier.identity, 32,
        )  # fmt: skip
        both = voting.embed(pixels)
    assert both.shape == (2, 1024)
    assert torch.equal(both[:, :512], plain) and not torch.equal(both[:, 512:], plain)


def test_a_head_that_no_module_computes_is_one_sentence() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean(dim=(2, 3)) @ self.fc.weight.T

    head = frozenset({"fc.weight", "fc.bias"})
    assert find_head(Functional(), head, 8) is None
    with pytest.raises(CnnftError, match="no module that makes logits"):
        find_embedding(Functional(), head, 8)


# ---------------------------------------------------------------- one assembly of predictions


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Labelled images that the model of `trained` has not seen; 10 of each class."""
    folder = tmp_path_factory.mktemp("new")
    return read_dataset(draw_folder(folder, ("ants", "bees"), 10, first_seed=300)).train


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return load(trained, device="cpu")


def test_a_prediction_does_not_depend_on_how_many_files_are_asked_for(
    classifier: Classifier, images: Samples
) -> None:
    """To the bit where the batches hold as many images, whoever else is in them."""

    def logits(samples: Samples, batch_size: int, workers: int = 0) -> Tensor:
        inference = Inference(batch_size=batch_size, workers=workers)
        return predict(classifier, samples, inference, "test").logits

    many = logits(images, 6)  # 6, 6, 6 and 2
    assert torch.equal(logits(images, 6, workers=2), many)
    for start in range(0, 20, 6):
        batch = images.take(range(start, min(start + 6, 20)))
        for workers in (0, 2):  # one batch is read without them
            assert torch.equal(logits(batch, 6, workers), many[start : start + 6])
    assert torch.equal(logits(images.take(reversed(range(6))), 6), many[:6].flip(0))
    each = logits(images, 1)
    assert torch.equal(logits(images.take([11]), 1), each[11:12])
    assert torch.equal(logits(images.take([11]), 32), each[11:12])
    torch.testing.assert_close(each, many, rtol=0, atol=1e-5)


def test_predict_evaluate_teachers_and_onnx_agree(
    classifier: Classifier, images: Samples, trained: Path, tmp_path: Path
) -> None:
    inference = Inference(batch_size=8, workers=0)
    found = predict(classifier, images, inference, "test")
    probabilities = found.logits.softmax(dim=1).tolist()
    for row, one in zip(
        probabilities, classifier.predict(images.paths, batch_size=8, workers=0), strict=True
    ):
        assert dict(one.top) == dict(zip(classifier.classes, row, strict=True))

    dataset = Dataset("new", {"train": images}, ())
    evaluation = evaluate(classifier, dataset, inference, Seen())
    assert evaluation.overall == found.score()

    spec = classifier.input_spec
    targets = make_soft_targets([classifier], spec, images, inference, same_views=True)
    assert torch.equal(targets(torch.empty(0), range(20)), found.logits)

    pixels = torch.stack([classifier.preprocess(read_image(path)) for path in images.paths])
    with torch.no_grad():
        torch.testing.assert_close(classifier.forward(pixels), found.logits, rtol=0, atol=1e-5)

    onnxruntime = pytest.importorskip("onnxruntime", reason="needs cnnft[onnx]")
    file = export_model(trained, "onnx", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), found.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", ["trained", "finetuned"])
def test_what_validation_kept_is_what_predict_says(
    run: str, request: pytest.FixtureRequest
) -> None:
    """In the feature extractor validation reads features that the cache holds."""
    path = request.getfixturevalue(run)
    kept = Run.open(path).predictions()
    assert kept is not None and kept.role == "val" and len(kept.samples) == 4
    found = predict(load(path, device="cpu"), kept.samples, Inference(workers=0), "val")
    torch.testing.assert_close(kept.logits, found.logits, rtol=0, atol=1e-5)


def test_predictions_are_of_every_sample_in_order_and_a_file_that_is_gone_is_told(
    classifier: Classifier, images: Samples
) -> None:
    seen: list[None] = []
    found = predict(
        classifier, images, Inference(batch_size=7, workers=0), "test", lambda: seen.append(None)
    )
    assert len(seen) == len(images) == len(found.logits) and found.samples is images
    assert (found.predicted == found.labels).float().mean() > 0.8
    gone = replace(images, paths=(*images.paths[:-1], "gone.png"))
    with pytest.raises(CnnftError, match=r"gone.png cannot be read .*the data changed meanwhile"):
        predict(classifier, gone, Inference(workers=0), "test")


# ---------------------------------------------------------------- a guest in the caller's process


def test_the_callers_random_generators_stay_as_they_are(tmp_path: Path, flat: Path) -> None:
    def states() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    settings = {"backbone": "builtin", "runs_dir": tmp_path, "epochs": 1, "dropout": 0.5}
    config = Config.of(flat, batch_size=8, mixup=0.2, workers=1, device="cpu", **settings)
    plan = prepare(config)
    assert states() == before
    for event in run_plan(plan):
        assert states() == before, event
    assert isinstance(event, Finished)
    classifier = load(event.run.path, device="cpu")
    assert states() == before
    for workers in (0, 1):
        classifier.predict([flat / "ants" / "0.png"] * 3, batch_size=2, workers=workers)
        assert states() == before
    classifier.embed(torch.zeros(1, 3, 32, 32))
    open_backbone("resnet10t", 3, pretrained=False)
    run = finetune(flat, mode="feature-extractor", pretrained=False, workers=0, **settings)
    assert states() == before and run.path.is_dir()
