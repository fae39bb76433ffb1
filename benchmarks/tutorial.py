"""The transfer-learning loop that people write by hand, to compare cnnft with.

The recipe is that of PyTorch's transfer-learning tutorial (resnet18, SGD with lr 0.001 and
momentum 0.9, StepLR(7, 0.1), batches of 4, 25 epochs): either the whole network is fine-tuned, or
everything but a new last layer is frozen. Written from the recipe with torch and torchvision alone.

    python benchmarks/tutorial.py DATA [--frozen] [--weights resnet18.pth]
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms import v2

Batches = Iterable[tuple[Tensor, Tensor]]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform(train: bool) -> v2.Compose:
    crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
    if not train:
        crop = [v2.Resize(256), v2.CenterCrop(224)]
    return v2.Compose(
        [*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )


def replace_head(model: nn.Module, classes: int, frozen: bool) -> None:
    """Put a new last layer in; with `frozen` nothing else will train."""
    for parameter in model.parameters():
        parameter.requires_grad = not frozen
    model.fc = nn.Linear(model.fc.in_features, classes)


def make_optimizer(model: nn.Module) -> SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SGD(trained, lr=0.001, momentum=0.9)


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    keep_frozen_statistics: bool = False,
) -> list[float]:
    """One epoch; returns the loss of every step.

    The tutorial puts the whole network in train mode, so that in frozen mode BatchNorm normalises
    with the batch and goes on changing the statistics of the "frozen" network. With
    `keep_frozen_statistics` everything but the last layer stays in eval mode instead.
    """
    model.train()
    if keep_frozen_statistics:
        model.eval()
        model.fc.train()
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scheduler.step()
    return losses


def accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    correct = seen = 0
    with torch.no_grad():
        for images, labels in batches:
            correct += int((model(images).argmax(dim=1) == labels).sum())
            seen += len(labels)
    return correct / seen


def main() -> None:
    parser = argparse.ArgumentParser(description="The transfer-learning tutorial, by hand.")
    parser.add_argument("data", type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--frozen", action="store_true", help="train the last layer only")
    parser.add_argument("--weights", type=Path, help="a resnet18 state dict instead of a download")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    loaders = {
        part: DataLoader(
            ImageFolder(options.data / part, transform(part == "train")),
            batch_size=options.batch_size,
            shuffle=part == "train",
        )
        for part in ("train", "val")
    }
    model = resnet18(weights=None if options.weights else ResNet18_Weights.IMAGENET1K_V1)
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    replace_head(model, len(loaders["train"].dataset.classes), options.frozen)
    optimizer = make_optimizer(model)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    best = 0.0
    for epoch in range(options.epochs):
        losses = train_epoch(model, loaders["train"], optimizer, scheduler)
        current = accuracy(model, loaders["val"])
        best = max(best, current)
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, val {current:.4f}")
    print(f"best val {best:.4f} (selected on val)")


if __name__ == "__main__":
    main()
