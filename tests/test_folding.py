"""BatchNorm that a convolution computes: the same function, and only where that is so."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cnnft.models.freezing import changing, train_mode
from cnnft.models.surgery.fold import folded, folds
from cnnft.models.surgery.substitute import Substituted


def with_statistics(network: nn.Module) -> nn.Module:
    """Normalisations that do something, as after training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def pixels(size: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size)


def test_networks_of_many_kinds_give_the_same_probabilities() -> None:
    kinds = {
        "resnet10t": 0,  # all of them
        "mobilenetv3_small_050": 0,  # normalisation and activation are one module
        "densenet121": 62,  # most come before the convolution
        "convnext_atto": 0,  # it has none
        "levit_128s": 48,  # after linear layers, whose output it flattens
    }
    for name, left in kinds.items():
        size = (
            224 if name == "levit_128s" else 96
        )  # it is built for one, others see a smaller example
        network = with_statistics(timm.create_model(name, num_classes=5))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        quick = folded(network, size)
        assert norms(quick) == left, name
        with torch.inference_mode():
            expected, found = (n(pixels(size)).softmax(dim=1) for n in (network, quick))
        assert torch.allclose(found, expected, rtol=0, atol=1e-6), name
        after = network.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_linear_layer_takes_its_normalisation_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.BatchNorm1d(4))
    quick = folded(with_statistics(network), 16)
    assert norms(quick) == 0
    with torch.inference_mode():
        assert torch.allclose(quick(pixels()), network(pixels()), rtol=0, atol=1e-6)


class Branching(nn.Module):
    """The convolution's output is used besides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor) -> Tensor:
        convolved = self.conv(pixels)
        return self.norm(convolved) + convolved


@pytest.mark.parametrize(
    "layers",
    [
        [Branching()],
        [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)],
        [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)],
    ],
    ids=["used twice", "something between", "before"],
)
def test_what_cannot_be_folded_is_left_as_it_is(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    quick = folded(with_statistics(network), 16)
    assert norms(quick) == 1
    with torch.inference_mode():
        assert torch.equal(quick(pixels()), network(pixels()))


def test_in_training_frozen_layers_alone_are_folded() -> None:
    network = with_statistics(timm.create_model("resnet10t", num_classes=3))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    names = changing(network)
    quick = Substituted(network, folds(network, 64, names))
    assert norms(network) - norms(quick) == sum(
        isinstance(module, _BatchNorm) and not path.startswith("layer4")
        for path, module in network.named_modules()
    )
    train_mode(network)
    results = []
    for computing in (network, quick):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.zero_grad()
        computing(pixels(64)).square().sum().backward()
        gradients = [p.grad.clone() for p in network.parameters() if p.requires_grad]
        statistics = network.layer4[0].bn1.running_mean.clone()
        results.append((*gradients, statistics))
        network.load_state_dict(before)
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
