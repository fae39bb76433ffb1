"""How much to train, measured: cnnft's modes against the tutorial loop, on small draws.

    python tools/recipe_table.py --data DIR --weights DIR --results FILE

For each data set, a number of images per class is drawn from train/ and split 80 : 20; every
method trains on the one part, selects its best epoch on the other, and is scored on val/, which
nothing was chosen on. All methods see the same draws, weights, image size and number of epochs.
Results are appended to --results as they come, so that an interrupted run goes on; --pilot scores
on the images of train/ that were not drawn instead, which is where recipes are developed.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import tutorial
from cnnft import Config, load
from cnnft.batches import view_batches
from cnnft.images import read_image
from cnnft.inference import infer_all
from cnnft.recipe import carry_out, prepare
from cnnft.transforms import EvaluationViews, InputSpec, training_transform

SETS = ("hymenoptera", "textures", "flowers")
PER_CLASS = (20, 60)
SIDE = 128  # of the reduced files, in pixels: decoding is not what is measured

METHODS: dict[str, dict[str, object] | None] = {
    "tutorial loop": None,
    "feature-extractor": {"mode": "feature-extractor"},
    "feature-extractor, probe first": {"mode": "feature-extractor", "probe_first": True},
    "finetune": {"mode": "finetune"},
    "finetune, probe first": {"mode": "finetune", "probe_first": True},
    "bn-only, probe first": {"mode": "bn-only", "probe_first": True},
    "1 stage, probe first": {"train_stages": 1, "probe_first": True},
    "3 stages, probe first": {"train_stages": 3, "probe_first": True},
    "auto": {"mode": "auto"},
}


@dataclass(frozen=True)
class Draw:
    """Images of one data set on disk, reduced: train/ and val/ to learn from, and test/."""

    folder: Path
    name: str
    per_class: int
    seed: int


def draw(source: Path, target: Path, per_class: int, seed: int, pilot: bool) -> Draw:
    for folder in sorted(path for path in (source / "train").iterdir() if path.is_dir()):
        files = sorted(folder.iterdir(), key=lambda path: _rank(seed, path))
        inside = round(0.8 * per_class)
        _reduce(files[:inside], target / "train" / folder.name)
        _reduce(files[inside:per_class], target / "val" / folder.name)
        scored = files[per_class:] if pilot else sorted((source / "val" / folder.name).iterdir())
        _reduce(scored, target / "test" / folder.name)
    return Draw(target, source.name, per_class, seed)


def _rank(seed: int, path: Path) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + path.read_bytes()).digest()


def _reduce(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in files:
        image = read_image(path)
        scale = SIDE / min(image.size)
        image = image.resize([max(round(side * scale), 1) for side in image.size], 1)
        image.save(folder / f"{path.stem}.jpg", quality=95)


def train_cnnft(
    drawn: Draw, options: argparse.Namespace, settings: dict[str, object], runs: Path
) -> tuple[torch.nn.Module, InputSpec, str]:
    config = Config(
        drawn.folder,
        backbone=f"local-dir:{options.weights}",
        image_size=options.size,
        epochs=options.epochs,
        seed=drawn.seed,
        workers=0,
        runs_dir=runs,
        device="cpu",
        **settings,  # type: ignore[arg-type]
    )
    plan = prepare(config)
    for event in carry_out(plan):
        finished = event
    classifier = load(finished.run.path, device="cpu")
    chosen = plan.config
    return (
        classifier.network,
        classifier.input_spec,
        f"{chosen.mode}, stages {chosen.train_stages}, probe {chosen.probe_first}",
    )


def train_by_hand(
    drawn: Draw, options: argparse.Namespace, spec: InputSpec
) -> tuple[torch.nn.Module, InputSpec, str]:
    """The tutorial loop with its rates, schedule and batches of 4, and the best epoch on val."""
    torch.manual_seed(drawn.seed)
    loaders = {
        part: DataLoader(
            ImageFolder(str(drawn.folder / part), transform), batch_size=4, shuffle=part == "train"
        )
        for part, transform in (
            ("train", training_transform(spec)),
            ("val", lambda image: EvaluationViews(spec)(image)[0]),
        )
    }
    classes = len(loaders["train"].dataset.classes)
    network = timm.create_model(
        f"local-dir:{options.weights}", pretrained=True, num_classes=classes
    )
    network.classifier = torch.nn.Linear(network.classifier.in_features, classes)
    optimizer = tutorial.make_optimizer(network)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    best, kept = -1.0, None
    for _ in range(options.epochs):
        tutorial.train_epoch(network, loaders["train"], optimizer, scheduler)
        current = tutorial.accuracy(network, loaders["val"])
        if current > best:
            best, kept = current, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(kept)
    return network, spec, ""


def is_correct(network: torch.nn.Module, spec: InputSpec, folder: Path) -> list[int]:
    """For every image below `folder`, in their order, whether it is classified right."""
    samples = ImageFolder(str(folder)).samples
    paths = [Path(path) for path, _ in samples]
    batches = view_batches(paths, EvaluationViews(spec), 32, 0)
    predicted = infer_all(network, batches, paths).argmax(dim=1).tolist()
    return [int(p == label) for p, (_, label) in zip(predicted, samples, strict=True)]


def measure(options: argparse.Namespace) -> None:
    done = {_key(row) for row in _rows(options.results)}
    spec = None
    for seed in range(options.seeds):
        for name in SETS:
            for per_class in PER_CLASS:
                missing = [m for m in options.methods if (name, per_class, seed, m) not in done]
                if not missing:
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    scratch = Path(temporary)
                    drawn = draw(
                        options.data / name, scratch / "data", per_class, seed, options.pilot
                    )
                    for method in missing:
                        started = time.monotonic()
                        settings = METHODS[method]
                        if spec is None:
                            plan = prepare(
                                Config(
                                    drawn.folder,
                                    backbone=f"local-dir:{options.weights}",
                                    image_size=options.size,
                                )
                            )
                            spec = plan.classifier.input_spec
                        network, its_spec, chosen = (
                            train_by_hand(drawn, options, spec)
                            if settings is None
                            else train_cnnft(drawn, options, settings, scratch / "runs")
                        )
                        row = {
                            "set": name,
                            "per_class": per_class,
                            "seed": seed,
                            "method": method,
                            "chosen": chosen,
                            "seconds": round(time.monotonic() - started, 1),
                            "correct": is_correct(network, its_spec, drawn.folder / "test"),
                        }
                        with options.results.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        accuracy = np.mean(row["correct"])
                        print(name, per_class, seed, method, chosen, row["seconds"],
                              f"{accuracy:.3f}", flush=True)  # fmt: skip


def _rows(path: Path) -> Iterator[dict[str, object]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return row["set"], row["per_class"], row["seed"], row["method"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="timm's folder layout")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
