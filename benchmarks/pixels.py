"""What the pixel cache saves, and what a reduced copy of the images costs.

    python -m benchmarks.pixels loading FOLDER [--size 224] [--rounds 3]
    python -m benchmarks.pixels training FOLDER --backbone NAME [--mode finetune] [--epochs 4]
    python -m benchmarks.pixels probabilities FOLDER -m RUN [--enlarge 4]
    python -m benchmarks.pixels accuracy FOLDER --backbone NAME [--size 112] [--seeds 5]

loading: images per second of CPU time of one process that makes training views from files, memory
and the disk, which take turns.
training: seconds of CPU time of an epoch with its validation, for each --cache, in one process; the
first has the decoding, and disk comes twice, as for a first run and the next one.
probabilities: how far the probabilities of a run move when its images are read as training reads
them; --enlarge stands for a camera with more pixels (bicubic, saved as JPEG of quality 90).
accuracy: the best val accuracy of runs that train on copies of several resolutions.
"""

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from cnnft import Config, load
from cnnft.cache.pixels import CachedImages, cache_images
from cnnft.data.augmentation import training_transform
from cnnft.data.dataset import Samples
from cnnft.data.folders import image_files
from cnnft.data.images import FULL, PixelSpec, read_image
from cnnft.data.loading import ImageFiles, Loading, TrainingImages, view_batches
from cnnft.data.reading import read_dataset
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.inference.predict import collect, predict_batches
from cnnft.runs.records import Epoch
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

FACTORS = 8 / 7, 1.5, 2.0
"""Resolutions of the copy, in sides of the network's input; 8/7 is evaluation's own."""


def loading(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # as in the processes that load images
    samples = read_dataset(options.folder, ("train",)).train
    spec = InputSpec(options.size, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    print("| resolution | files | memory | disk | kB per image |\n|---|---|---|---|---|")
    for factor in (*FACTORS, None):
        pixels = FULL if factor is None else PixelSpec(round(factor * options.size))
        parts = [
            CachedImages(ImageFiles(samples.paths, pixels), samples.hashes, "benchmark")
            for _ in range(3)
        ]
        for images, cache in zip(parts, ("off", "ram", "disk"), strict=True):
            list(cache_images([images], cache, epochs=2))
        views = [TrainingImages(samples, training_transform(spec), 0, images) for images in parts]
        rounds = [[timed(view, epoch) for view in views] for epoch in range(options.rounds)]
        speeds = [len(samples) / statistics.median(times) for times in zip(*rounds, strict=True)]
        array = parts[1].cached
        assert array is not None
        name = "full" if factor is None else f"{pixels.short_side} px"
        size = int(array.ends[-1]) / len(array.ends) / 1e3
        print(f"| {name} | {' | '.join(f'{speed:.0f}' for speed in speeds)} | {size:.0f} |")


def timed(views: TrainingImages, epoch: int) -> float:
    start = time.process_time()
    for index in range(len(views)):
        views[epoch, index]
    return time.process_time() - start


def training(options: argparse.Namespace) -> None:
    print("| --cache | first epoch | each later one |\n|---|---|---|")
    for cache in ("off", "ram", "disk", "disk"):
        with tempfile.TemporaryDirectory() as runs:
            config = Config.of(
                options.folder, backbone=options.backbone, mode=options.mode, cache=cache,
                epochs=options.epochs, workers=0, runs_dir=runs, probe_first=False,
                image_size=options.size,
            )  # fmt: skip
            plan = prepare(config)
            ends = [time.process_time()]
            for event in run_plan(plan):
                if isinstance(event, Epoch):
                    ends.append(time.process_time())
        first, *later = (end - start for start, end in pairwise(ends))
        print(f"| {cache} | {first:.1f} | {statistics.median(later):.1f} |", flush=True)


def finish(plan) -> list[dict[str, str]]:
    """The rows of the history."""
    for event in run_plan(plan):
        last = event
    with (last.run.path / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities(options: argparse.Namespace) -> None:
    classifier = load(options.model)
    spec = classifier.input_spec
    with tempfile.TemporaryDirectory() as folder:
        paths = list(enlarged(options.folder, options.enlarge, Path(folder)))
        views = EvaluationViews(spec)

        def probabilities_of(pixels: PixelSpec) -> torch.Tensor:
            images = ImageFiles(paths, pixels)
            batches = view_batches(paths, views, Loading(32, 0), images)
            return collect(predict_batches(classifier.network, batches), paths).softmax(dim=1)

        exact = probabilities_of(FULL)
        print(f"{len(paths)} images, {spec.size} px\n")
        print(f"read in full: {reading(paths, FULL):.0f} ms per image\n")
        print("| read as | mean change | largest | other class | ms |\n|---|---|---|---|---|")
        for factor in FACTORS:
            for decoder in ("pillow", "draft"):
                pixels = PixelSpec(round(factor * spec.size), decoder)
                found = probabilities_of(pixels)
                change = (found - exact).abs()
                other = int((found.argmax(dim=1) != exact.argmax(dim=1)).sum())
                print(
                    f"| {pixels.short_side} px, {decoder} | {change.mean():.4f} "
                    f"| {change.max():.3f} | {other} | {reading(paths, pixels):.0f} |"
                )


def reading(paths: list[str], pixels: PixelSpec) -> float:
    """CPU time in ms per image."""
    some = paths[:40]
    start = time.process_time()
    for path in some:
        read_image(path, pixels)
    return 1000 * (time.process_time() - start) / len(some)


def enlarged(folder: Path, factor: int, to: Path) -> Iterator[str]:
    for number, path in enumerate(image_files(folder)[0]):
        if factor == 1:
            yield path
            continue
        image = Image.open(path).convert("RGB")
        size = factor * image.width, factor * image.height
        image.resize(size, Image.Resampling.BICUBIC).save(to / f"{number}.jpg", quality=90)
        yield str(to / f"{number}.jpg")


def accuracy(options: argparse.Namespace) -> None:
    """The runs of one seed train on the same images, from the same weights."""
    print("| resolution | val accuracy, mean | minus full, by seed: mean |\n|---|---|---|")
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for factor in (None, *FACTORS):
            side = "full" if factor is None else round(factor * options.size)
            with tempfile.TemporaryDirectory() as runs:
                config = Config.of(
                    options.folder, backbone=options.backbone, epochs=options.epochs, seed=seed,
                    image_size=options.size, train_resolution=side, workers=0, runs_dir=runs,
                )  # fmt: skip
                plan = prepare(config)
                drawn = draw(plan.train, options.images, seed)
                batches = replace(plan.batches, images=len(drawn))
                rows = finish(replace(plan, train=drawn, batches=batches))
            best = max(float(row["val_accuracy"]) for row in rows)
            found.setdefault(str(side), []).append(best)
    for side, values in found.items():
        gaps = [value - full for value, full in zip(values, found["full"], strict=True)]
        words = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
        mean = 100 * statistics.mean(values)
        print(f"| {side} | {mean:.1f} % | {words}: {100 * statistics.mean(gaps):+.2f} |")


def draw(samples: Samples, images: int, seed: int) -> Samples:
    """So many of each class."""
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    return samples.take(
        index
        for label in range(len(samples.classes))
        for index in [i for i in order if samples.labels[i] == label][:images]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The pixel cache and reduced copies.")
    parser.add_argument("what", choices=["loading", "training", "probabilities", "accuracy"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--mode", default="finetune")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=25, help="of each class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enlarge", type=int, default=1)
    options = parser.parse_args()
    globals()[options.what](options)


if __name__ == "__main__":
    main()
