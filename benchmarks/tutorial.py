"""The transfer-learning loop that people write by hand, to compare cnnft with.

The recipe is that of PyTorch's transfer-learning tutorial (resnet18, SGD with lr 0.001 and
momentum 0.9, StepLR(7, 0.1), batches of 4, four workers, 25 epochs): either the whole network is
fine-tuned, or everything but a new last layer is frozen. Written from the recipe with torch and
torchvision alone.

    python -m benchmarks.tutorial DATA [--frozen] [--weights resnet18.pth]
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
WORKERS = 4


class Epoch(NamedTuple):
    losses: list[float]
    val_accuracy: float
    seconds: float
    """Of training alone, without validation."""


def transform(
    train: bool, size: int = 224, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> v2.Compose:
    crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    if not train:
        crop = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    return v2.Compose(
        [*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )


def make_loader(
    folder: Path, transform: Callable, batch_size: int, shuffle: bool, workers: int = WORKERS
) -> DataLoader:
    return DataLoader(
        ImageFolder(folder, transform),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
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
    losses, device = [], next(model.parameters()).device
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scheduler.step()
    return losses


def accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    correct, seen, device = 0, 0, next(model.parameters()).device
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            correct += int((model(images).argmax(dim=1) == labels).sum())
            seen += len(labels)
    return correct / seen


def fit(model: nn.Module, train: Batches, val: Batches, epochs: int) -> Iterator[Epoch]:
    optimizer = make_optimizer(model)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    for _ in range(epochs):
        start = time.perf_counter()
        losses = train_epoch(model, train, optimizer, scheduler)
        seconds = time.perf_counter() - start
        yield Epoch(losses, accuracy(model, val), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="The transfer-learning tutorial, by hand.")
    parser.add_argument("data", type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--frozen", action="store_true", help="train the last layer only")
    parser.add_argument("--weights", type=Path, help="a resnet18 state dict instead of a download")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=WORKERS, help="of each loader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, val = (
        make_loader(
            options.data / part,
            transform(part == "train"),
            options.batch_size,
            shuffle=part == "train",
            workers=options.workers,
        )
        for part in ("train", "val")
    )
    model = resnet18(weights=None if options.weights else ResNet18_Weights.IMAGENET1K_V1)
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    replace_head(model, len(train.dataset.classes), options.frozen)
    best = 0.0
    for number, epoch in enumerate(fit(model, train, val, options.epochs), start=1):
        loss, best = sum(epoch.losses) / len(epoch.losses), max(best, epoch.val_accuracy)
        print(f"epoch {number}: loss {loss:.4f}, val {epoch.val_accuracy:.4f}")
    print(f"best val {best:.4f} (selected on val)")


if __name__ == "__main__":
    main()
