"""Measure what the built-in backbone's features are worth and write the table of its document.

For each data set, a logistic regression on frozen, globally average-pooled features of the built-in
backbone, of the same network with random weights and of ImageNet weights, and on HOG and colour
histograms. The regularisation C is chosen by 5-fold cross-validation inside the training images;
the images that score are read once per row.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

try:
    from scipy.stats import binomtest
    from skimage.feature import hog
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    sys.exit(
        f"{error.name} is missing; this tool needs scikit-learn and scikit-image (cnnft[research])"
    )

from tools.document import fill

Array = np.ndarray
Transform = Callable[[Image.Image], Tensor]

BATCH = 64
RANDOM_SEEDS = (0, 1, 2)
SUBSET_SEED = 0
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# name, folder of the images that score, training images per class where not all of them are used
REAL_SETS = (("hymenoptera", "val", None), ("textures", "val", None), ("flowers", "val", 100))
HOG_SIDE, HOG_CELL, HOG_DIRECTIONS = 128, 32, 8  # cross-validation on train prefers 32 to 16


@dataclass
class Part:
    """The images that train a probe, or those that score it."""

    paths: list[Path]
    labels: Array

    @classmethod
    def read(cls, folder: Path, per_class: int | None = None) -> "Part":
        """Images in class folders; with `per_class`, that many of each class, drawn with a seed."""
        paths, labels, rng = [], [], np.random.default_rng(SUBSET_SEED)
        for label, subfolder in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
            found = sorted(p for p in subfolder.iterdir() if p.is_file())
            if per_class is not None:
                found = [found[i] for i in sorted(rng.permutation(len(found))[:per_class])]
            paths += found
            labels += [label] * len(found)
        return cls(paths, np.array(labels))

    def pictures(self) -> Iterator[Image.Image]:
        """All images, upright RGB."""
        for path in self.paths:
            with Image.open(path) as image:
                yield ImageOps.exif_transpose(image).convert("RGB")

    def batches(self, transform: Transform) -> Iterator[Tensor]:
        """All images through a network's own preprocessing, a batch at a time."""
        tensors = map(transform, self.pictures())
        while batch := list(islice(tensors, BATCH)):
            yield torch.stack(batch)


@dataclass
class DataSet:
    """One column of the table."""

    name: str
    train: Part
    test: Part

    @property
    def title(self) -> str:
        classes = len(np.unique(self.train.labels))
        return (
            f"{self.name}<br>{classes} classes, {len(self.train.labels)} → {len(self.test.labels)}"
        )


def probe(data: DataSet, train: Array, test: Array) -> float:
    """Accuracy of a logistic regression; nothing of `test` decides anything."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    # The grid search for C repeats the fit 25 times: a loose tolerance costs no accuracy here.
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    search = GridSearchCV(model, {"logisticregression__C": C_GRID}, cv=folds)
    return float(search.fit(train, data.train.labels).score(test, data.test.labels))


@torch.inference_mode()
def features(model: nn.Module, batches: Iterable[Tensor]) -> Array:
    """Globally average-pooled output of a network without classifier."""
    return torch.cat([model(batch) for batch in batches]).numpy()


def random_network(folder: Path, seed: int, images: Tensor) -> nn.Module:
    """The built-in architecture with random weights and the BatchNorm statistics of `images`.

    Untrained BatchNorm statistics (mean 0, variance 1) would make random features look worse than
    they are. timm's initialisation stays: it starts residual branches at zero, and its random
    features do better than those with every branch at work.
    """
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(seed)
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = None  # the plain average over all batches
    model.train()
    with torch.no_grad():
        for batch in images[torch.randperm(len(images))].split(BATCH):
            model(batch)
    return model.eval()


def pretrained(folder: Path) -> tuple[nn.Module, Transform]:
    """A network from a timm folder, and its own preprocessing."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def hand_made(picture: Image.Image) -> Array:
    """Histograms of oriented gradients and of colours (4 levels per channel)."""
    square = ImageOps.fit(picture, (HOG_SIDE, HOG_SIDE), Image.Resampling.BICUBIC)
    cells = (HOG_CELL, HOG_CELL)
    gradients = hog(square.convert("L"), HOG_DIRECTIONS, cells, (2, 2), feature_vector=True)
    red, green, blue = np.moveaxis(np.asarray(square) // 64, 2, 0)
    colours = np.bincount((16 * red + 4 * green + blue).ravel(), minlength=64) / HOG_SIDE**2
    return np.concatenate([gradients, np.sqrt(colours)])


def cell(accuracy: float, count: int) -> str:
    """Accuracy in percent with its 95 % Wilson interval."""
    interval = binomtest(round(accuracy * count), count).proportion_ci(0.95, "wilson")
    return f"{100 * accuracy:.1f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def measure(data: DataSet, builtin: Path, imagenet: Path) -> list[str]:
    """One column of the table, from chance to ImageNet weights."""
    count = len(data.test.labels)
    column = [cell(np.bincount(data.test.labels).max() / count, count)]

    model, transform = pretrained(builtin)
    train, test = list(data.train.batches(transform)), list(data.test.batches(transform))
    scores = []
    for seed in RANDOM_SEEDS:
        network = random_network(builtin, seed, torch.cat(train))
        scores.append(probe(data, features(network, train), features(network, test)))
    spread = f"{100 * min(scores):.1f} to {100 * max(scores):.1f}"
    column.append(f"{cell(float(np.mean(scores)), count)}<br>seeds: {spread}")

    parts = (data.train, data.test)
    described = [np.stack([hand_made(picture) for picture in p.pictures()]) for p in parts]
    column.append(cell(probe(data, *described), count))
    column.append(cell(probe(data, features(model, train), features(model, test)), count))

    model, transform = pretrained(imagenet)
    seen = [features(model, part.batches(transform)) for part in parts]
    column.append(cell(probe(data, *seen), count))
    return column


def name_of(folder: Path) -> str:
    """Architecture, number of parameters and input size of a timm folder."""
    model, _ = pretrained(folder)
    side = timm.data.resolve_model_data_config(model)["input_size"][-1]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    return f"{architecture}, {millions:.2f} M parameters, {side} px"


def sha256(folder: Path) -> str:
    """The first digits of the weights' hash."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def machine() -> str:
    """Cores, processor and the version of torch."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    return f"{os.cpu_count()} cores ({processor}), 1 thread, torch {torch.__version__}"


def main() -> None:
    """Measure every column, then put the table between the two markers of the document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of hymenoptera, textures and flowers")
    add("--imagenet", type=Path, required=True, help="timm folder with ImageNet weights")
    add("--sample", type=Path, default=Path("sample_data"), help="default: %(default)s")
    add("--builtin", type=Path, default=Path("cnnft/models/builtin"), help="default: %(default)s")
    add(
        "--output", type=Path, default=Path("docs/builtin-backbone.md"), help="default: %(default)s"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)
    started, columns, sets = time.monotonic(), [], []
    digest = sha256(options.builtin)
    for name, test, per_class in REAL_SETS:
        folder = options.data / name
        sets.append(DataSet(name, Part.read(folder / "train", per_class), Part.read(folder / test)))
    sample = options.sample
    sets.append(DataSet("sample_data", Part.read(sample / "train"), Part.read(sample / "test")))
    for data in sets:
        columns.append(measure(data, options.builtin, options.imagenet))
        print(data.name, *columns[-1], sep=" | ", file=sys.stderr)

    if sha256(options.builtin) != digest:
        sys.exit(f"{options.builtin}: the weights changed while they were measured; run again")
    rows = [
        "largest class",
        f"random weights, mean of {len(RANDOM_SEEDS)} seeds",
        "HOG + colour histogram",
        f"**built-in** ({name_of(options.builtin)})",
        f"ImageNet ({name_of(options.imagenet)})",
    ]
    table = ["| features | " + " | ".join(data.title for data in sets) + " |"]
    table.append("|---" * (len(sets) + 1) + "|")
    for row, cells in zip(rows, zip(*columns, strict=True), strict=True):
        table.append(f"| {row} | " + " | ".join(cells) + " |")
    minutes = (time.monotonic() - started) / 60
    facts = (
        "Measured with `python -m research.pretrain.probe_table --data DIR --imagenet DIR` in "
        f"{minutes:.0f} minutes on {machine()}. "
        f"SHA-256 of the built-in `model.safetensors`: `{digest}…`."
    )
    fill(options.output, "probe table", "\n".join([*table, "", facts]))


if __name__ == "__main__":
    main()
