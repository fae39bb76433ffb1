"""Images per second of each preset, as one loading process makes them: reading, decoding, changing.

    python -m benchmarks.augmentation FOLDER [--images 100] [--size 224] [--rounds 5]

The presets take turns, so that whatever else the machine does meets all of them; the figure is the
median over rounds of the ratio to basic in the same round.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from cnnft.data.augmentation import PRESETS, training_transform
from cnnft.data.dataset import Samples
from cnnft.data.folders import image_files
from cnnft.data.loading import TrainingImages
from cnnft.data.transforms import InputSpec


def seconds(dataset: TrainingImages, epoch: int) -> float:
    start = time.perf_counter()
    for index in range(len(dataset)):
        dataset[epoch, index]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the presets of --augment are.")
    parser.add_argument("folder", type=Path, help="photographs, also in folders below")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    torch.set_num_threads(1)  # as in the processes that load images
    paths, _ = image_files(options.folder)
    paths = random.Random(0).sample(paths, min(options.images, len(paths)))
    samples = Samples(tuple(paths), (0,) * len(paths), ("photographs",))
    spec = InputSpec(options.size, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = {
        name: TrainingImages(samples, training_transform(spec, parts), seed=0)
        for name, parts in PRESETS.items()
    }
    seconds(images["basic"], 0)  # brings the files into memory
    rounds = [
        {name: seconds(dataset, epoch) for name, dataset in images.items()}
        for epoch in range(options.rounds)
    ]
    print("| preset | images/s | of basic |\n|---|---|---|")
    for name in PRESETS:
        speed = len(paths) / statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times["basic"] / times[name] for times in rounds)
        print(f"| {name} | {speed:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
