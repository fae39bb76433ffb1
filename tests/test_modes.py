"""How much trains: stages, bn-only, probe first, auto, heads, layer decay."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cnnft import Config, load
from cnnft.config.choices import BatchNorm
from cnnft.errors import UsageError
from cnnft.models.backbones import open_backbone
from cnnft.models.freezing import batchnorms, freeze, freezes_statistics, train_mode
from cnnft.models.heads import add_dropout, classifier_layer, initialise, replace_by_mlp
from cnnft.models.stages import stages
from cnnft.probe.solve import fit, solve
from cnnft.training.advice import SIMILAR, SMALL, TABLE, Advice
from cnnft.training.finetune import run_plan
from cnnft.training.optim import Start, learning_rates, make_optimizer
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return open_backbone("builtin", 3)


def trained_names(network: torch.nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 5, "conv1.weight", "layer4.1.bn2.bias"),
        ("torchvision/resnet18", 5, "conv1.weight", "layer4.1.bn2.bias"),
        ("torchvision/alexnet", 7, "features.0.weight", "classifier.4.bias"),
        ("torchvision/densenet161", 8, "features.conv0.weight", "features.norm5.bias"),
        ("torchvision/vit_b_16", 13, "class_token", "encoder.ln.bias"),
        ("convnext_tiny", 5, "stem.0.weight", "head.norm.bias"),
        ("vit_tiny_patch16_224", 13, "cls_token", "norm.bias"),
    ],
)
def test_stages_run_from_the_input_to_the_head(name, count, first, last):
    from cnnft.models.build import build
    from cnnft.models.heads import head_tensors
    from cnnft.models.registry import resolve

    identity = resolve(name)
    with torch.device("meta"):
        network = build(identity, 7)
    head = head_tensors(network, lambda classes: build(identity, classes))
    found = stages(network, head)
    assert (len(found), found[0][0], found[-1][-1]) == (count, first, last)
    staged = [parameter for stage in found for parameter in stage]
    assert len(staged) == len(set(staged))
    assert set(staged) | head == {n for n, _ in network.named_parameters()}


@pytest.mark.parametrize("count", range(6))
def test_the_last_stages_train(backbone, count):
    freeze(backbone.network, backbone.head, backbone.stages, "finetune", count)
    expected = {name for stage in backbone.stages[5 - count :] for name in stage}
    assert trained_names(backbone.network) == expected | backbone.head


def test_more_stages_than_there_are(cnnft: Cli, flat: Path, tmp_path: Path):
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--train-stages", 6, "--runs-dir", tmp_path / "runs"
    )
    outcome.fails_with(2, "--train-stages 6", "has 5 stages")
    assert not (tmp_path / "runs").exists()


def test_bn_only_trains_scales_and_shifts_and_their_statistics(backbone):
    network = backbone.network
    freeze(network, backbone.head, backbone.stages, "bn-only")
    norms = {
        path for path, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    expected = {f"{path}.{name}" for path in norms for name in ("weight", "bias")}
    assert trained_names(network) == expected | backbone.head
    train_mode(network)
    assert all(network.get_submodule(path).training for path in norms)
    assert not network.conv1[0].training


def test_bn_only_without_normalisation(cnnft: Cli, flat: Path, tmp_path: Path):
    cnnft(
        "finetune", flat, "--backbone=torchvision/alexnet", "--no-pretrained", "--mode=bn-only",
        "--image-size=64", "--workers=0", "--runs-dir", tmp_path / "runs",
    ).fails_with(2, "--mode bn-only", "no normalisation layers")  # fmt: skip


@pytest.mark.parametrize(
    ("batchnorm", "batch_size", "frozen"),
    [("auto", 32, False), ("auto", 4, True), ("train", 4, False), ("frozen", 32, True)],
)
def test_batchnorm_statistics_of_trained_layers(
    backbone, batchnorm: BatchNorm, batch_size: int, frozen: bool
):
    assert freezes_statistics(batchnorm, pretrained=True, batch=batch_size) is frozen
    freeze(backbone.network, backbone.head, backbone.stages, "finetune")
    train_mode(backbone.network, batchnorms(backbone.network, backbone.head) if frozen else ())
    assert backbone.network.bn1.training is not frozen
    assert backbone.network.fc.training


def test_layer_decay_slows_each_stage_towards_the_input(backbone):
    config = Config.of("-", layer_decay=0.5).optim
    freeze(backbone.network, backbone.head, backbone.stages, "finetune")
    rates = learning_rates(config, "resnet10t", 32, Start("pretrained"))
    optimizer = make_optimizer(backbone.network, backbone.head, backbone.stages, rates, config)
    found = [group["lr"] for group in optimizer.param_groups if group["name"] == "backbone"]
    assert found == pytest.approx([0.00125 / 2**i for i in range(5)])
    last = {id(dict(backbone.network.named_parameters())[n]) for n in backbone.stages[-1]}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == last


# ---------------------------------------------------------------- heads


def test_the_head_is_drawn_as_torch_draws_a_layer_whatever_the_library_does():
    """timm's EfficientNets scale by the number of classes: their weights would be 0.7 wide."""
    network = open_backbone("mobilenetv2_035", 2, pretrained=False).network
    head = frozenset({"classifier.weight", "classifier.bias"})
    assert network.classifier.weight.abs().max() > 0.5
    initialise(network, head, "default")
    assert network.classifier.weight.abs().max() <= 1 / math.sqrt(1280)


@pytest.mark.parametrize("how", ["xavier", "kaiming", "zeros"])
def test_initial_weights_of_the_head(backbone, how):
    layer = backbone.network.fc
    body = backbone.network.conv1[0].weight.clone()
    initialise(backbone.network, backbone.head, how)
    variance = {"xavier": 2 / (256 + 3), "kaiming": 1 / 256, "zeros": 0.0}[how]
    assert float(layer.weight.detach().var()) == pytest.approx(variance, rel=0.3)
    assert not layer.bias.any()
    assert torch.equal(backbone.network.conv1[0].weight, body)


def test_an_mlp_head_trains_saves_and_loads(cnnft: Cli, flat: Path, tmp_path: Path):
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--head=mlp", "--mode=feature-extractor",
        "--epochs=1", "--workers=0", "--dropout", 0.5, "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    classifier = load(outcome.out.strip(), device="cpu")
    assert classifier.head == {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}
    first = classifier.predict(flat / "ants" / "0.png", workers=0)
    exported = cnnft("export", outcome.out.strip(), "--format", "head")
    assert load(exported.out.strip(), device="cpu").predict(flat / "ants/0.png", workers=0) == first


def test_a_convolutional_head_takes_no_mlp():
    backbone = open_backbone("torchvision/squeezenet1_1", 3, pretrained=False)
    with pytest.raises(UsageError, match="--head mlp"):
        replace_by_mlp(backbone.network, backbone.head)


def test_dropout_acts_while_training_and_renames_nothing(backbone):
    network, names = backbone.network, list(backbone.network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected = network.eval()(images)
    add_dropout(network, backbone.head, 0.5)
    assert list(network.state_dict()) == names
    assert torch.equal(network.eval()(images), expected)
    freeze(network, backbone.head, backbone.stages, "feature-extractor")
    train_mode(network)
    assert not torch.equal(network(images), network(images))


@pytest.mark.slow
def test_auxiliary_classifiers_are_head_and_belong_to_finetuning_alone(tmp_path: Path):
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 3)
    for mode, used in (("finetune", True), ("feature-extractor", False)):
        plan = prepare(
            Config.of(
                data, backbone="torchvision/inception_v3", pretrained=False, mode=mode, epochs=1,
                workers=0, batch_size=4, runs_dir=tmp_path / "runs", device="cpu",
                probe_first=used or None,
            )
        )  # fmt: skip
        assert (plan.head_from == "probe") is used
        network = plan.classifier.network
        assert hasattr(network, "AuxLogits") and (network.AuxLogits is not None) is used
        auxiliary = {name for name, _ in network.named_parameters() if "AuxLogits.fc" in name}
        assert plan.classifier.head == {"fc.weight", "fc.bias"} | auxiliary
        assert len(auxiliary) == 2 * used
    small = Config.of(data, backbone="torchvision/inception_v3", pretrained=False, image_size=128)
    assert prepare(small).classifier.network.AuxLogits is None


# ---------------------------------------------------------------- the probe


def clouds(seed: int, n: int = 90, width: int = 12, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(n) % classes
    scale = torch.rand(width, generator=generator) * 9 + 0.1
    values = (centres[labels] + torch.randn(n, width, generator=generator)) * scale + 5
    return values, labels


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1e-2, 1e-1, 1.0]))
def test_the_fit_is_scikit_learns(seed, strength):
    values, labels = clouds(seed)
    fitted = fit(values[None], labels, 3, strength)
    standardised = StandardScaler().fit_transform(values.double().numpy())
    oracle = LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=10_000)
    oracle.fit(standardised, labels.numpy())
    expected = torch.from_numpy(oracle.predict_proba(standardised)).float()
    found = fitted(values).softmax(dim=1).float()
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_feature_that_is_always_the_same_does_no_harm():
    values, labels = clouds(1)
    values[:, 0] = 3.0
    found = fit(values[None], labels, 3, 0.1)
    assert found.weight.isfinite().all() and found.bias.isfinite().all()


def test_cross_validation_is_honest():
    """Labels that have nothing to do with the features are guessed."""
    values, _ = clouds(0, n=300, width=100)
    labels = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1))
    found = solve(values[None], labels, 3, torch.arange(300) % 5)
    assert abs(found.accuracy - 1 / 3) < 0.1
    weak = fit(values[None], labels, 3, 1e-3)
    assert (weak(values).argmax(dim=1) == labels).float().mean() > 0.6


def test_the_probe_is_the_head_before_the_first_step(flat: Path, tmp_path: Path):
    settings_ = {"mode": "finetune", "backbone": "builtin", "workers": 0, "device": "cpu"}
    plan = prepare(Config.of(flat, **settings_, seed=3))
    assert plan.head_from == "probe" and plan.advice is not None
    assert plan.config.freezing.probe_first is None
    assert "0.00625 / 10 = 0.000625 (probed)" in plan.rates.derivation
    correct = [
        prediction.label == plan.train.classes[label]
        for prediction, label in zip(
            plan.classifier.predict(plan.train.paths, workers=0), plan.train.labels, strict=True
        )
    ]
    assert all(correct)  # stripes that a linear classifier tells apart, before any training


def test_no_probe_where_it_makes_no_sense(flat: Path):
    for settings_ in (
        {"mode": "feature-extractor", "head_solver": "sgd"},
        {"pretrained": False},
        {"head": "mlp"},
        {"probe_first": False},
        {"head_init": "zeros"},
        {"train_stages": 0, "head_lr": 0.1},
    ):
        plan = prepare(Config.of(flat, backbone="builtin", workers=0, device="cpu", **settings_))
        assert plan.head_from == "new" and plan.advice is None, settings_


def test_a_probe_that_cannot_be_the_head(cnnft: Cli, flat: Path, tmp_path: Path):
    cnnft(
        "finetune", flat, "--backbone=torchvision/squeezenet1_1", "--no-pretrained",
        "--probe-first", "--image-size=64", "--workers=0", "--runs-dir", tmp_path / "runs",
    ).fails_with(2, "--probe-first", "no single linear layer")  # fmt: skip


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("images", [SMALL - 1, SMALL])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_every_dataset_is_in_one_cell(images, accuracy):
    advice = Advice(images, accuracy, chance=0.25)
    assert (advice.cell.size == "small") is (images < SMALL)
    assert (advice.cell.similarity == "similar") is (advice.learned >= SIMILAR)
    assert [cell for cell in TABLE if cell == advice.cell] == [advice.cell]


def test_learned_is_measured_from_chance():
    assert Advice(10, 0.25, 0.25).learned == 0 and Advice(10, 1.0, 0.25).learned == 1
    assert Advice(10, 0.625, 0.25).learned == pytest.approx(0.5)


def test_a_normalisation_in_the_head_is_not_kept():
    backbone = open_backbone("levit_128s", 3, pretrained=False)
    kept = batchnorms(backbone.network, backbone.head)
    assert backbone.network.head.bn not in kept and len(kept) > 10


def test_seeds_reach_random_backbones(flat: Path):
    hashes = [
        prepare(
            Config.of(
                flat, backbone="builtin", pretrained=False, seed=seed, workers=0, device="cpu"
            )
        ).classifier.pretrained_hash
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_probe_counts_each_content_once(flat: Path, tmp_path: Path):
    for path in sorted(flat.glob("*/*.png")):
        shutil.copy(path, path.with_name(f"again {path.name}"))
    settings_ = {"mode": "finetune", "backbone": "builtin", "workers": 0, "device": "cpu"}
    plan = prepare(Config.of(flat, **settings_))
    assert len(plan.train) == 32 and plan.advice.images_per_class == 8


@pytest.mark.parametrize(
    "flags",
    [
        {"mode": "feature-extractor", "layer_decay": 0.5},
        {"head": "mlp", "probe_first": True},
        {"head": "mlp", "head_init": "zeros"},
        {"batchnorm": "frozen", "pretrained": False},
        {"mode": "bn-only", "train_stages": 2},
    ],
)
def test_settings_that_contradict_each_other(flags):
    with pytest.raises(UsageError, match="--"):
        Config.of("-", **flags)


def test_layer_decay_is_told_and_the_last_stage_is_in_the_history(cnnft: Cli, flat, tmp_path):
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--epochs=1", "--workers=0", "--layer-decay=0.5",
        "--schedule=step", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    assert "each stage before the last: × 0.5" in outcome.err
    header, row = (Path(outcome.out.strip()) / "history.csv").read_text().splitlines()
    assert float(row.split(",")[header.split(",").index("lr_backbone")]) == 0.000625


# ---------------------------------------------------------------- the twelve

TWELVE = (
    *("resnet18", "alexnet", "squeezenet1_0", "vgg16", "densenet161", "inception_v3", "googlenet"),
    *("shufflenet_v2_x1_0", "mobilenet_v2", "resnext50_32x4d", "wide_resnet50_2", "mnasnet1_0"),
)
FAMILIES = (
    *("seresnet50", "resnet50", "resnetv2_50", "resnext50_32x4d", "inception_v3", "inception_v4"),
    *("inception_resnet_v2", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "regnety_004", "mobilenetv3_small_100"),
    *("mobilenetv4_conv_small", "densenet121", "vgg11"),
)
QUICK = {"torchvision/squeezenet1_0", "torchvision/shufflenet_v2_x1_0", "torchvision/resnet18"}


@pytest.mark.parametrize("mode", ["feature-extractor", "finetune"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*(f"torchvision/{name}" for name in TWELVE), *FAMILIES)
    ],
)
def test_backbones_train_on_images(name, mode, tmp_path: Path):
    data = draw_folder(tmp_path / "data", ("ants", "bees"), 4)
    size = {"torchvision/inception_v3": 299, "torchvision/googlenet": 96}.get(name, 96)
    fixed = name in {"vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"}
    plan = prepare(
        Config.of(
            data, backbone=name, pretrained=False, mode=mode, epochs=1, batch_size=3, workers=0,
            image_size=224 if fixed else size, runs_dir=tmp_path / "runs", device="cpu",
            head_solver="sgd" if mode == "feature-extractor" else "auto",
        )
    )  # fmt: skip
    network, head = plan.classifier.network, plan.classifier.head
    with torch.no_grad():  # random layers without statistics of their own fade images to nothing
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None
        network.train()(
            torch.randn(8, 3, plan.classifier.input_spec.size, plan.classifier.input_spec.size)
        )
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    statistics = {n: b.clone() for n, b in network.named_buffers() if n.endswith("running_mean")}
    for _ in run_plan(plan):
        pass
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert head & before.keys() <= moved
    if mode == "feature-extractor":
        assert moved == head & before.keys()
        assert all(torch.equal(dict(network.named_buffers())[n], b) for n, b in statistics.items())
    else:
        # timm starts residual branches at zero: the first step moves only their last scale.
        assert len(moved) > 0.5 * len(before)
    assert classifier_layer(network, head)[1] is not None
