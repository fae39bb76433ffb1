"""Names, local weights, the hash of a backbone, and how it sees images."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from cnnft import Config, finetune, load
from cnnft.analysis.export import export_model
from cnnft.data.images import read_image
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import CnnftError, UsageError
from cnnft.models import catalogue
from cnnft.models.backbones import open_backbone
from cnnft.models.build import build, build_undrawn
from cnnft.models.freezing import freeze, train_mode
from cnnft.models.registry import resolve
from cnnft.models.weights import backbone_hash, read_weights
from cnnft.runs.run import Run
from tools.sweep import PRETRAINED, PretrainedRow, examine, pretrained


@pytest.mark.parametrize(
    ("name", "full", "size", "mean"),
    [
        ("resnet18", "resnet18.a1_in1k", 224, 0.485),
        ("resnet50.tv_in1k", "resnet50.tv_in1k", 224, 0.485),
        ("vit_base_patch16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k", 224, 0.5),
        ("torchvision/inception_v3", "torchvision/inception_v3@IMAGENET1K_V1", 299, 0.485),
        ("torchvision/resnet50@IMAGENET1K_V1", "torchvision/resnet50@IMAGENET1K_V1", 224, 0.485),
        ("builtin", "builtin", 128, 0.485),
    ],
)
def test_names_resolve_without_building_anything(name, full, size, mean):
    from cnnft.models.identity import input_spec

    identity = resolve(name)
    assert identity.name == full
    assert (input_spec(identity).size, input_spec(identity).mean[0]) == (size, mean)
    assert resolve(full) == identity


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("resnet81", "resnet"),
        ("biultin", "builtin"),
        ("torchvision/resnet81", "torchvision/resnet"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("torchvision/resnet18@V9", "IMAGENET1K_V1"),
    ],
)
def test_unknown_names_get_near_ones(wrong, near):
    with pytest.raises(UsageError, match=near):
        resolve(wrong)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return squeezenet1_1().state_dict()


@pytest.mark.parametrize(
    "form",
    [
        *("safetensors", "bare.pth", "state_dict.pth", "model.pth", "module.pth", "ema.pth"),
        *("backbone.pth", "lightning.pth"),
    ],
)
def test_local_weights_in_the_forms_that_people_have(form, weights, tmp_path):
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(weights, path)
    else:
        wrapped = {
            "bare.pth": weights,
            "state_dict.pth": {"state_dict": weights, "epoch": 3},
            "model.pth": {"model": weights},
            "ema.pth": {
                "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
                "model_ema": weights,
            },
            "backbone.pth": {f"backbone.{name}": tensor for name, tensor in weights.items()}
            | {"neck.weight": torch.zeros(3)},
            "lightning.pth": {
                "state_dict": {f"model.backbone.{name}": t for name, t in weights.items()}
            },
            "module.pth": {f"module.{name}": tensor for name, tensor in weights.items()},
        }
        torch.save(wrapped[form], path)
    backbone = open_backbone("torchvision/squeezenet1_1", 7, weights=path)
    state = backbone.network.state_dict()
    assert backbone.head == {"classifier.1.weight", "classifier.1.bias"}
    assert backbone.weights.matched == len(weights) - 2 and not backbone.weights.missing
    assert set(backbone.weights.unused) >= backbone.head
    assert all(torch.equal(state[k], weights[k]) for k in weights if k not in backbone.head)
    assert state["classifier.1.weight"].shape[0] == 7


def test_an_old_head_of_the_same_size_is_not_kept(weights, tmp_path):
    """1,000 new classes are not ImageNet's."""
    save_file(weights, tmp_path / "w.safetensors")
    backbone = open_backbone("torchvision/squeezenet1_1", 1000, weights=tmp_path / "w.safetensors")
    assert not torch.equal(
        backbone.network.state_dict()["classifier.1.weight"], weights["classifier.1.weight"]
    )


def test_weights_of_another_architecture_are_refused(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CnnftError, match=r"w\.safetensors does not hold .* resnet18.*--backbone"):
        open_backbone("torchvision/resnet18", 3, weights=tmp_path / "w.safetensors")


def test_position_embeddings_of_another_network_are_missing_not_an_error(tmp_path):
    state = open_backbone("test_vit", 3, pretrained=False).network.state_dict()
    state["pos_embed"] = torch.zeros(1, state["pos_embed"].shape[1] + 2, 64)
    save_file(state, tmp_path / "w.safetensors")
    assert open_backbone("test_vit", 3, weights=tmp_path / "w.safetensors").weights.missing == (
        "pos_embed",
    )


def test_a_head_file_finds_its_backbone_in_the_hubs_cache(tmp_path, monkeypatch, flat):
    """The weights have the classifier that they were published with, whatever ours has."""
    theirs = timm.create_model("test_resnet.r160_in1k")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    snapshot = tmp_path / "hf/models--timm--test_resnet.r160_in1k/snapshots/0"
    snapshot.mkdir(parents=True)
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    run = finetune(
        flat, backbone="test_resnet", mode="feature-extractor", epochs=1, workers=0,
        runs_dir=tmp_path / "runs", device="cpu",
    )  # fmt: skip
    head = export_model(run.path, "head")
    image = flat / "ants" / "0.png"
    assert load(head, device="cpu").predict(image) == load(run.path, device="cpu").predict(image)


def test_a_torchvision_run_is_no_local_dir(tmp_path):
    description = {
        "architecture": "resnet18",
        "pretrained_cfg": {},
        "cnnft": {"backbone": {"library": "torchvision"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(CnnftError, match="of torchvision"):
        open_backbone(f"local-dir:{tmp_path}", 3)


def test_a_folder_that_timm_wrote_opens_for_another_number_of_classes(tmp_path):
    from timm.models import save_for_hf

    network = timm.create_model("test_resnet", num_classes=4)
    save_for_hf(network, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {"num_classes": 4, "in_chans": 3}  # as timm 1.0.31 has it
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = open_backbone(f"local-dir:{tmp_path}", 3)
    assert backbone.weights.missing == ()
    assert backbone.network(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


@pytest.mark.parametrize("name", ["test_vit", "torchvision/vit_b_16"])
def test_position_embeddings_are_resampled_for_another_size(name, tmp_path):
    torch.save(open_backbone(name, 3, pretrained=False).network.state_dict(), tmp_path / "w.pth")
    backbone = open_backbone(name, 3, weights=tmp_path / "w.pth", image_size=64)
    assert backbone.weights.missing == () and backbone.input_spec.size == 64
    assert backbone.network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 50), ("torchvision/vit_b_16", 50), ("torchvision/alexnet", 20)]
)
def test_sizes_that_a_network_cannot_take(name, size):
    with pytest.raises(UsageError, match=f"--image-size {size}: backbone {name}"):
        open_backbone(name, 3, pretrained=False, image_size=size)


def test_a_backbone_from_the_hugging_face_hub(tmp_path, monkeypatch):
    """A repository in the hub's cache, laid out as its library does; nothing is downloaded."""
    theirs = timm.create_model("test_resnet", num_classes=11)
    repository = tmp_path / "models--someone--birds"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    description = {
        "architecture": "test_resnet",
        "num_classes": 11,
        "pretrained_cfg": {**theirs.pretrained_cfg, "num_classes": 11, "mean": [0.1, 0.2, 0.3]},
    }
    (snapshot / "config.json").write_text(json.dumps(description))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = open_backbone("hf-hub:someone/birds", 3)
    assert backbone.input_spec.mean == (0.1, 0.2, 0.3) and backbone.weights.missing == ()
    ours, original = backbone.network.state_dict(), theirs.state_dict()
    assert all(torch.equal(ours[k], original[k]) for k in ours if k not in backbone.head)


# A sample of what tools/sweep.py does for all of them.
@pytest.mark.parametrize(
    "name",
    [
        *("torchvision/resnet18", "torchvision/googlenet", "torchvision/maxvit_t"),
        *(
            "levit_128s",
            "deit_tiny_distilled_patch16_224",
            "convnext_tiny",
            "mobilenetv3_small_100",
        ),
        *("xcit_nano_12_p16_224", "mixer_s32_224", "test_nfnet"),
    ],
)
def test_a_sample_of_the_sweep(name):
    row = examine(name)
    assert row.result == "ok" and row.stages >= 2


@pytest.mark.parametrize(
    "name", ["builtin", "resnet18", "vit_base_patch16_224", "regnetz_005", "torchvision/resnet50"]
)
def test_the_table_of_weights_has_what_the_library_has(name, monkeypatch, tmp_path):
    """Where it is of the installed releases."""
    release = torchvision.__version__.partition("+")[0]
    if catalogue.versions() != f"timm {timm.__version__} and torchvision {release}":
        pytest.skip(f"the table is of {catalogue.versions()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (entry,) = (entry for entry in catalogue.find(f"{name}*") if entry.name == name)
    expected = pretrained(name)
    assert [(w.name, w.licence) for w in entry.weights] == [
        (row.weights, row.licence or None) for row in expected
    ]
    assert [w.local for w in entry.weights] == [row.place == "" for row in expected]
    with PRETRAINED.open(encoding="utf-8") as file:
        next(file)
        rows = [PretrainedRow(**row) for row in csv.DictReader(file) if row["backbone"] == name]
    assert rows == expected


def test_weights_on_this_machine_are_marked(cnnft, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    for file, content in {"snapshots/0/model.safetensors": "", "refs/main": "0"}.items():
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(content)
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    outcome = cnnft("backbones", "resnet18")
    assert "a1_in1k*, a2_in1k," in outcome.out and "IMAGENET1K_V1*" in outcome.out
    assert f"backbones of {catalogue.versions()}; *" in outcome.err


def test_a_normalisation_that_goes_with_the_classifier_is_head():
    backbone = open_backbone("levit_128s", 3, pretrained=False)
    assert {name.rpartition(".")[0] for name in backbone.head} == {
        *("head.bn", "head.linear", "head_dist.bn", "head_dist.linear"),
    }


# ---------------------------------------------------------------- how the network sees images


def summary_of(cnnft, *arguments):
    outcome = cnnft("finetune", "--backbone=builtin", "--workers=0", "--epochs=1", *arguments)
    assert outcome.code == 0, outcome.err
    return json.loads((Path(outcome.out.strip()) / "config.json").read_text())


def test_size_fit_and_normalisation_are_saved_and_used_later(cnnft, flat, tmp_path):
    config = summary_of(
        cnnft, flat, "--image-size=64", "--fit=pad", "--normalize=0.1,0.2,0.3/0.4,0.5,0.6",
        "--mode=feature-extractor", "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    spec = config["cnnft"]["input_spec"]
    assert (spec["size"], spec["fit"]) == (64, "pad")
    assert (spec["mean"], spec["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    classifier = load(tmp_path / "runs" / "flat-builtin", device="cpu")
    assert classifier.input_spec == InputSpec(**spec | {k: tuple(spec[k]) for k in ("mean", "std")})


def test_dataset_statistics_are_those_of_the_training_images(cnnft, flat, tmp_path):
    config = summary_of(
        cnnft, flat, "--normalize=dataset", "--mode=feature-extractor", "--batch-size=3",
        "--runs-dir", tmp_path / "runs",
    )  # fmt: skip
    run = tmp_path / "runs" / "flat-builtin"
    spec = load(run, device="cpu").input_spec
    views = EvaluationViews(replace(spec, mean=(0.0,) * 3, std=(1.0,) * 3))
    paths = Run.open(run).dataset().train.paths
    pixels = torch.stack([views(read_image(path))[0] for path in paths])
    pixels = pixels.double().transpose(0, 1).flatten(1)
    assert config["cnnft"]["input_spec"]["mean"] == pytest.approx(pixels.mean(dim=1).tolist())
    assert spec.std == pytest.approx(pixels.std(dim=1, correction=0).tolist())


@pytest.mark.parametrize("text", ["mean", "1,2,3", "1,2/3,4", "1,2,3/0,1,1", "1,2,nan/1,1,1", "/"])
def test_statistics_of_another_form(text):
    with pytest.raises(UsageError, match="--normalize"):
        Config.of("-", normalize=text)


def test_nothing_in_a_weights_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CnnftError, match="tensors only"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name",
    ["builtin", "torchvision/googlenet", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"],
)
def test_what_will_be_filled_is_built_without_random_numbers(name: str):
    identity, tensors = resolve(name), []
    for make in (build, build_undrawn):
        network = make(identity, 3)
        tensors.append(dict(network.named_parameters()) | dict(network.named_buffers()))
    drawn, undrawn = tensors
    assert drawn.keys() == undrawn.keys()
    for found, expected in zip(undrawn.values(), drawn.values(), strict=True):
        assert found.shape == expected.shape and found.requires_grad == expected.requires_grad
        assert found.equal(expected) or not found.any()
    assert sum(not found.equal(drawn[name]) for name, found in undrawn.items()) > 10


def test_the_hash_covers_everything_but_the_head():
    identity = resolve("builtin")
    network = build(identity, 3)
    head = frozenset({"fc.weight", "fc.bias"})
    before = backbone_hash(network, head)
    state = network.state_dict()
    state["fc.weight"].add_(1)
    assert backbone_hash(network, head) == before
    for name in ("layer1.0.conv1.weight", "layer1.0.bn1.running_var", "bn1.num_batches_tracked"):
        original = state[name].clone()
        state[name].add_(1)
        assert backbone_hash(network, head) != before
        state[name].copy_(original)
    assert backbone_hash(network, head) == before


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/inception_v3",
        "torchvision/googlenet",
        "torchvision/regnet_y_400mf",
        "torchvision/squeezenet1_0",
        "test_vit",
        "test_convnext",
    ],
)
def test_every_kind_of_head_is_found_and_trains_alone(name):
    backbone = open_backbone(name, 7, pretrained=False)
    network, size = backbone.network, backbone.input_spec.size
    freeze(network, backbone.head, backbone.stages, "feature-extractor")
    train_mode(network)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == backbone.head


def test_the_builtin_backbone_is_small_and_sound():
    backbone = open_backbone("builtin", 4)
    assert backbone.weights.missing == () and backbone.head == {"fc.weight", "fc.bias"}
    assert all(torch.isfinite(t).all() for t in backbone.network.state_dict().values())
