"""cnnft against other people's arithmetic: the hand-written loop, torchvision's and timm's
transforms, timm's reading of a run directory."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import SHARED, draw, draw_folder
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torchvision.models import get_model_weights, resnet18

from benchmarks import tutorial
from cnnft import load
from cnnft.config.schema import Config
from cnnft.data.images import read_image
from cnnft.data.reading import read_dataset
from cnnft.data.sampler import KeyedBatches
from cnnft.data.transforms import EvaluationViews, Normalizing
from cnnft.data.viewsets import ViewSet
from cnnft.inference.predict import Inference
from cnnft.models.freezing import freeze
from cnnft.models.heads import head_tensors
from cnnft.models.identity import input_spec
from cnnft.models.registry import resolve
from cnnft.models.stages import stages
from cnnft.training.optim import LearningRates, make_optimizer
from cnnft.training.schedules import Length, make_schedule
from cnnft.training.state import TrainState
from cnnft.training.step import StepDone, train

HEAD = frozenset({"fc.weight", "fc.bias"})
IMAGES, BATCH, EPOCHS, STEP_EPOCHS = 22, 5, 4, 2  # 5 steps an epoch, the last of 2 images


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images in float64, in the order that cnnft's sampler gives."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (IMAGES,), generator=generator)
    for keys in KeyedBatches(IMAGES, BATCH, seed, EPOCHS):
        chosen = [index for _, index in keys]
        yield pixels[chosen], labels[chosen]


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = resnet18().double()
    with torch.no_grad():  # statistics that differ from those of a batch
        model.train()(torch.randn(16, 3, 32, 32, dtype=torch.float64))
    return model


@pytest.mark.parametrize("mode", ["feature-extractor", "finetune"])
def test_train_takes_the_steps_of_the_tutorial_loop(network, mode):
    tutorial.replace_head(network, classes=3, frozen=mode == "feature-extractor")
    network.double()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    optimizer = tutorial.make_optimizer(network)
    scheduler = StepLR(optimizer, STEP_EPOCHS, 0.1)
    expected: list[float] = []
    all_batches = list(batches(seed=7))
    for epoch in range(EPOCHS):
        of_epoch = all_batches[5 * epoch : 5 * epoch + 5]
        expected += tutorial.train_epoch(
            network, of_epoch, optimizer, scheduler, keep_frozen_statistics=mode != "finetune"
        )

    network.load_state_dict(start)
    freeze(network, HEAD, stages(network, HEAD), mode)
    config = Config.of("-", mode=mode, schedule="step", step_epochs=STEP_EPOCHS)
    groups, rates = stages(network, HEAD), LearningRates(0.001, 0.001, "")
    state = TrainState(
        network=network,
        optimizer=make_optimizer(network, HEAD, groups, rates, config.optim),
        schedule=make_schedule(config.schedule, Length(EPOCHS, steps_per_epoch=5)),
        keys=KeyedBatches(IMAGES, BATCH, 7, EPOCHS),
    )
    events = train(state, batches(seed=7), partial(cross_entropy, reduction="sum"))
    losses = [event.loss.item() for event in events if isinstance(event, StepDone)]

    assert len(losses) == 20 and [len(labels) for _, labels in all_batches[:5]] == [5, 5, 5, 5, 2]
    assert losses == pytest.approx(expected, rel=0, abs=1e-8)
    assert abs(losses[0] - losses[-1]) > 1e-3  # something was learned


@pytest.fixture(params=[(40, 32), (301, 200), (150, 500)], ids=str)
def photo(request, tmp_path) -> Path:
    return draw(tmp_path / "photo.jpg", 1, 0, size=request.param)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "inception_v3", "efficientnet_b3"])
def test_evaluation_tensor_equals_torchvisions(name, photo):
    spec = input_spec(resolve(f"torchvision/{name}"))
    theirs = get_model_weights(name).DEFAULT.transforms()(Image.open(photo))
    assert torch.equal(EvaluationViews(spec)(read_image(photo))[0], theirs)


@pytest.mark.parametrize(
    "name",
    [
        "builtin",
        "resnet18",
        "mobilenetv3_large_100",
        "convnext_tiny.fb_in22k",
        "tf_efficientnetv2_b3",
        "vit_base_patch16_siglip_224",
    ],
)
def test_evaluation_tensor_equals_timms(name, photo):
    identity = resolve(name)
    config = timm.data.resolve_data_config(pretrained_cfg=identity.pretrained_cfg)
    theirs = timm.data.create_transform(**config, is_training=False)(Image.open(photo))
    assert torch.equal(EvaluationViews(input_spec(identity))(read_image(photo))[0], theirs)


@pytest.mark.parametrize("tta", ["none", "hflip", "ten-crop"])
def test_bytes_are_normalised_to_the_same_tensor(tta, photo):
    spec = input_spec(resolve("resnet18"))
    views, image = ViewSet(spec, tta), read_image(photo)
    network = Normalizing(torch.nn.Conv2d(3, 3, 1), spec)
    network.network = torch.nn.Identity()
    assert torch.equal(network(views.as_bytes(image)), views(image))


def timm_logits(run: Path, image: Path) -> Tensor:
    """What a timm user gets from the run directory, without cnnft."""
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        return model(transform(Image.open(image).convert("RGB"))[None])[0]


def own_logits(run: Path, image: Path) -> Tensor:
    classifier = load(run)
    classifier.network.eval()
    with torch.inference_mode():
        return classifier.network(classifier.preprocess(read_image(image))[None])[0]


def test_timm_opens_a_run_and_gives_the_same_logits(trained, finetuned, tmp_path):
    photo = draw(tmp_path / "photo.jpg", 1, 0, size=(301, 200))
    for run in (trained, finetuned):
        ours = own_logits(run, photo)
        # a few units in the last place: kernels add in another order where weights lie otherwise
        torch.testing.assert_close(timm_logits(run, photo), ours, rtol=5e-7, atol=1e-6)


def test_timm_opens_a_run_with_constructor_arguments(flat, tmp_path):
    from cnnft import finetune

    photo = draw(tmp_path / "photo.jpg", 1, 0, size=(301, 200))
    folder = tmp_path / "mobilenet"
    identity = replace(resolve("mobilenetv2_035"), model_args={"pad_type": "same"})
    write_timm_folder(folder, identity)
    run = finetune(flat, backbone=f"local-dir:{folder}", epochs=1, runs_dir=tmp_path, workers=0)

    assert load(run.path).identity.model_args == {"pad_type": "same"}
    ours = own_logits(run.path, photo)
    torch.testing.assert_close(timm_logits(run.path, photo), ours, rtol=1e-5, atol=1e-6)


def write_timm_folder(folder: Path, identity) -> None:
    """config.json and model.safetensors, random weights, small input."""
    import json

    from safetensors.torch import save_file

    model = timm.create_model(identity.architecture, **identity.model_args)
    folder.mkdir()
    config = identity.pretrained_cfg | {"input_size": [3, 64, 64], "mean": [0.5] * 3}
    description = {
        "architecture": identity.architecture,
        "num_classes": 1000,
        "model_args": identity.model_args,
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(description))
    save_file(model.state_dict(), folder / "model.safetensors")


def test_real_weights_keep_their_padding_and_normalisation(tmp_path):
    folder = SHARED / "weights" / "mobilenetv2_100.tf_in1k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: needs the real ImageNet weights")
    from cnnft.models.backbones import open_backbone

    as_folder = open_backbone(f"local-dir:{folder}", 2)
    as_file = open_backbone("mobilenetv2_100", 2, weights=folder / "model.safetensors")
    for backbone in (as_folder, as_file):
        assert backbone.identity.model_args == {"pad_type": "same"}
        assert backbone.input_spec.mean == (0.5, 0.5, 0.5)
        assert not backbone.weights.missing
        assert backbone.head == {"classifier.weight", "classifier.bias"}


def test_the_head_is_what_changes_with_the_number_of_classes():
    assert head_tensors(resnet18(num_classes=3), lambda n: resnet18(num_classes=n)) == HEAD


def test_an_image_of_the_real_folder_counts_once(tmp_path, trained):
    """Evaluation's n is the number of files, whatever the batch size."""
    from cnnft.analysis.evaluate import Seen, evaluate

    classifier = load(trained)
    data = draw_folder(tmp_path / "unseen", ("ants", "bees"), 7, first_seed=500)
    dataset = read_dataset(data, classes=classifier.classes)
    for batch_size in (1, 4, 13, 14, 100):
        found = evaluate(classifier, dataset, Inference(batch_size=batch_size, workers=0), Seen())
        assert found.overall.n == 14 and sum(map(sum, found.confusion)) == 14
