"""Names, local weights, and the hash of a backbone."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from cnnft.backbones import open_backbone
from cnnft.errors import CnnftError, UsageError
from cnnft.freezing import freeze, train_mode
from cnnft.pretrained import backbone_hash, read_weights
from cnnft.zoo import build, resolve


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
    from cnnft.zoo import input_spec

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
    "form", ["safetensors", "bare.pth", "state_dict.pth", "model.pth", "module.pth"]
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
            "module.pth": {f"module.{name}": tensor for name, tensor in weights.items()},
        }
        torch.save(wrapped[form], path)
    backbone = open_backbone("torchvision/squeezenet1_1", 7, weights=path)
    state = backbone.network.state_dict()
    assert backbone.head == {"classifier.1.weight", "classifier.1.bias"}
    assert backbone.weights.matched == len(weights) - 2 and not backbone.weights.missing
    assert set(backbone.weights.unused) == backbone.head
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
    with pytest.raises(CnnftError, match=r"w\.safetensors does not hold weights of resnet18"):
        open_backbone("torchvision/resnet18", 3, weights=tmp_path / "w.safetensors")


def test_nothing_in_a_weights_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("sprung").touch, ())

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CnnftError, match="tensors only"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


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
