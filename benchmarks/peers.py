"""Other people's tools, each with the settings that it documents, on the same `Job`.

    python -m benchmarks.peers NAME JOB       JOB: the fields of `Job` as JSON

All of them crop at random and mirror, and nothing more, and report the best epoch on val, as cnnft
does. Prints an `Outcome` as JSON, or {"absent": why}.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks import tutorial as by_hand


@dataclass(frozen=True)
class Job:
    data: str
    """Has train/<class>/ and val/<class>/; for inference any folder of class folders."""
    weights: str
    """timm's folder layout; for inference that of a trained network."""
    frozen: bool = False
    epochs: int = 25
    batch_size: int = 32
    size: int = 224
    device: str = "cpu"
    bf16: bool = False

    def network(self, classes: int | None = None) -> nn.Module:
        """With a new last layer for `classes`, or with the one that it has."""
        other = {} if classes is None else {"num_classes": classes}
        return timm.create_model(f"local-dir:{self.weights}", pretrained=True, **other).to(
            self.device
        )

    @property
    def classes(self) -> int:
        return sum(path.is_dir() for path in Path(self.data, "train").iterdir())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


class Outcome(NamedTuple):
    seconds: float
    """Of training with validation, or of inference; without starting up."""
    accuracy: float
    images_per_second: float | None = None
    """Of training alone, in the median epoch; None where the tool does not tell."""


class AbsentError(Exception):
    """The peer cannot do the job, because ..."""


def tutorial(job: Job) -> Outcome:
    """The loop that people write by hand: benchmarks/tutorial.py, on any of timm's networks."""
    torch.manual_seed(0)
    network = job.network(job.classes)
    if job.frozen:
        network.requires_grad_(False)
        network.get_classifier().requires_grad_(True)
    normalisation = {key: network.pretrained_cfg[key] for key in ("mean", "std")}
    train, val = (
        by_hand.make_loader(
            Path(job.data, part),
            by_hand.transform(part == "train", job.size, **normalisation),
            job.batch_size,
            shuffle=part == "train",
        )
        for part in ("train", "val")
    )
    start = time.perf_counter()
    with job.autocast():
        epochs = list(by_hand.fit(network, train, val, job.epochs))
    spent, best = time.perf_counter() - start, max(epoch.val_accuracy for epoch in epochs)
    return Outcome(
        spent, best, len(train.dataset) / statistics.median(epoch.seconds for epoch in epochs)
    )


def timm_train(job: Job) -> Outcome:
    """A re-creation of timm's train.py, which its package does not hold, from timm's own loaders,
    optimizer, schedule and loss with that script's defaults: 4 workers, SGD at 0.1 per 256 images,
    weight decay 2e-5, cosine, label smoothing 0.1, the last incomplete batch dropped.
    """
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import freeze, random_seed

    random_seed(42)
    network = job.network(job.classes)
    if job.frozen:
        freeze(network)
        network.get_classifier().requires_grad_(True)
    train = _timm_loader(job, network, "train", 4, is_training=True, color_jitter=None)
    val = _timm_loader(job, network, "validation", 4)
    optimizer = create_optimizer_v2(
        network, opt="sgd", lr=0.1 * job.batch_size / 256, momentum=0.9, weight_decay=2e-5
    )
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=job.epochs, warmup_epochs=min(5, job.epochs // 5)
    )
    loss_of, best, seconds = LabelSmoothingCrossEntropy(0.1), 0.0, []
    start = time.perf_counter()
    for epoch in range(job.epochs):
        epoch_start = time.perf_counter()
        network.train()
        for images, labels in train:
            with job.autocast():
                loss = loss_of(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step(epoch + 1)
        seconds.append(time.perf_counter() - epoch_start)
        best = max(best, _timm_accuracy(job, network, val))
    spent = time.perf_counter() - start
    return Outcome(spent, best, len(train) * job.batch_size / statistics.median(seconds))


def timm_validate(job: Job) -> Outcome:
    """A re-creation of timm's validate.py: 4 workers."""
    network = job.network()
    val = _timm_loader(job, network, "validation", 4)
    start = time.perf_counter()
    accuracy = _timm_accuracy(job, network, val)
    return Outcome(time.perf_counter() - start, accuracy)


def timm_inference(job: Job) -> Outcome:
    """A re-creation of timm's inference.py: 2 workers, the likeliest class in a CSV file."""
    network = job.network().eval()
    loader = _timm_loader(job, network, "", 2)
    start, found = time.perf_counter(), []
    with torch.inference_mode(), tempfile.TemporaryFile("w") as file:
        for images, labels in loader:
            with job.autocast():
                output = network(images)
            probability, index = output.softmax(-1).topk(1)
            found.append((index.cpu() == labels.cpu()[:, None], probability.float().cpu(), index))
        names = loader.dataset.filenames(basename=True)
        correct, probabilities, indices = map(torch.cat, zip(*found, strict=True))
        for name, index, probability in zip(names, indices, probabilities, strict=True):
            file.write(f"{name},{index.item()},{probability.item()}\n")
    return Outcome(time.perf_counter() - start, float(correct.float().mean()))


def _timm_loader(
    job: Job, network: nn.Module, split: str, workers: int, **training: Any
) -> Iterable[tuple[Tensor, Tensor]]:
    from timm.data import create_dataset, create_loader, resolve_model_data_config

    config = resolve_model_data_config(network)
    config["input_size"] = 3, job.size, job.size
    if training:
        del config["crop_pct"], config["crop_mode"]
        config["interpolation"] = "random"
    return create_loader(
        create_dataset("", job.data, split, is_training=bool(training)),
        batch_size=job.batch_size,
        num_workers=workers,
        device=torch.device(job.device),
        **config,
        **training,
    )


def _timm_accuracy(job: Job, network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    correct = seen = 0
    network.eval()
    with torch.inference_mode():
        for images, labels in loader:
            with job.autocast():
                output = network(images)
            correct += int((output.argmax(dim=1) == labels).sum())
            seen += len(labels)
    return correct / seen


def fastai(job: Job) -> Outcome:
    """vision_learner with its own head, Adam and one-cycle schedule, and as many workers as there
    are processors. FeatureExtractor, it trains the BatchNorm layers too, as is its default.
    """
    from fastai.vision.all import (
        FlipItem,
        ImageDataLoaders,
        RandomResizedCrop,
        accuracy,
        set_seed,
        vision_learner,
    )

    set_seed(0)
    loaders = ImageDataLoaders.from_folder(
        job.data,
        train="train",
        valid="val",
        item_tfms=[RandomResizedCrop(job.size), FlipItem()],
        bs=job.batch_size,
        device=torch.device(job.device),
    )
    learner = vision_learner(loaders, f"local-dir:{job.weights}", metrics=accuracy)
    if job.bf16:
        learner.to_bf16()
    start = time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        if job.frozen:
            learner.fit_one_cycle(job.epochs)
        else:
            learner.unfreeze()
            learner.fit_one_cycle(job.epochs, slice(learner.lr / 100, learner.lr))
    best = max(values[-1] for values in learner.recorder.values)
    return Outcome(time.perf_counter() - start, best)


def ultralytics(job: Job) -> Outcome:
    """Its classification trainer on torchvision's network of that name, with the trainer's own
    head, optimizer and workers: none on a CPU, up to 8 for a GPU.
    """
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": place}
        from ultralytics.models.yolo.classify import ClassificationTrainer

        body = _torchvision_body(job.network())

        class Trainer(ClassificationTrainer):
            def get_model(self, *arguments: Any, **options: Any) -> nn.Module:
                model = super().get_model(*arguments, **options)
                model.model[0].m.load_state_dict(body.state_dict())
                return model

        trainer = Trainer(overrides=_ultralytics_settings(job, Path(place)))
        start = time.perf_counter()
        trainer.train()
        spent = time.perf_counter() - start
    return Outcome(spent, trainer.metrics["metrics/accuracy_top1"])


def _torchvision_body(network: nn.Module) -> nn.Module:
    """torchvision's layers of that name before pooling, with the weights of timm's `network`."""
    name = network.pretrained_cfg["architecture"]
    if not name.startswith("resnet"):
        raise AbsentError(f"its trainer takes torchvision's networks, and {name} is none of those")
    body = torchvision.models.get_model(name)
    body.load_state_dict(network.state_dict())
    return nn.Sequential(*list(body.children())[:-2])


def _ultralytics_settings(job: Job, place: Path) -> dict[str, Any]:
    """`place` gets the description of the network, and what the trainer writes beside images."""
    for part in ("train", "val"):
        (place / part).symlink_to(Path(job.data, part).resolve())
    network = job.network()
    name, width = network.pretrained_cfg["architecture"], network.num_features
    layout = {
        "nc": job.classes,
        "backbone": [[-1, 1, "TorchVision", [width, name, None, True, 2, False]]],
        "head": [[-1, 1, "Classify", ["nc"]]],
    }
    description = place / "network.yaml"
    description.write_text(json.dumps(layout))  # JSON is YAML
    return {
        "model": str(description), "data": str(place), "project": str(place),
        "epochs": job.epochs, "batch": job.batch_size, "imgsz": job.size, "device": job.device,
        "amp": "bf16" if job.bf16 else False, "freeze": 1 if job.frozen else None,
        "scale": 0.92, "erasing": 0.0, "auto_augment": None,
        "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0,
        "plots": False, "verbose": False,
    }  # fmt: skip


PEERS: dict[str, Callable[[Job], Outcome]] = {
    "tutorial": tutorial,
    "timm-train": timm_train,
    "timm-validate": timm_validate,
    "timm-inference": timm_inference,
    "fastai": fastai,
    "ultralytics": ultralytics,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("job", type=json.loads)
    options = parser.parse_args()
    try:
        result = PEERS[options.name](Job(**options.job))._asdict()
    except (ImportError, AbsentError) as error:
        result = {"absent": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
