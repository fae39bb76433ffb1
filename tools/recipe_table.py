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
from typing import Any

import numpy as np
import timm
import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import tutorial
from cnnft import Config, load
from cnnft.augmentation import training_transform
from cnnft.batches import view_batches
from cnnft.finetuning import carry_out
from cnnft.images import read_image
from cnnft.inference import infer_all
from cnnft.planning import Plan, prepare
from cnnft.transforms import EvaluationViews, InputSpec
from tools.document import fill

SETS = ("hymenoptera", "textures", "flowers")
PER_CLASS = (20, 60)
DOCUMENT = Path(__file__).parents[1] / "docs" / "how-much-to-train.md"
REPLICATES = 2000
SIDE = 128  # of the reduced files, in pixels: decoding is not what is measured

METHODS: dict[str, dict[str, object] | int] = {
    "tutorial loop": 4,  # its size of a batch
    "tutorial loop, batches of 32": 32,
    "feature-extractor": {"mode": "feature-extractor"},
    "finetune, no probe": {"mode": "finetune", "probe_first": False},
    "finetune, probe first (default)": {},
    "bn-only": {"mode": "bn-only"},
    "last stage": {"train_stages": 1},
    "last 3 stages": {"train_stages": 3},
    "auto": {"mode": "auto"},
}


Row = dict[str, Any]
"""set, per_class, seed, method, the settings it came to, seconds, correct (0 or 1 per image)."""


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


def settle(drawn: Draw, options: argparse.Namespace, settings: dict[str, object]) -> Plan:
    return prepare(
        Config(
            drawn.folder,
            backbone=f"local-dir:{options.weights}",
            image_size=options.size,
            epochs=options.epochs,
            seed=drawn.seed,
            workers=0,
            runs_dir=drawn.folder.parent / "runs",
            device="cpu",
            **settings,  # type: ignore[arg-type]
        )
    )


def train_cnnft(plan: Plan) -> torch.nn.Module:
    for event in carry_out(plan):
        finished = event
    return load(finished.run.path, device="cpu").network


def train_by_hand(
    drawn: Draw, options: argparse.Namespace, spec: InputSpec, batch_size: int
) -> torch.nn.Module:
    """The tutorial loop with its rate and schedule, and the best epoch on val."""
    torch.manual_seed(drawn.seed)
    loaders = {
        part: DataLoader(
            ImageFolder(str(drawn.folder / part), transform),
            batch_size=batch_size,
            shuffle=part == "train",
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
    return network


def is_correct(network: torch.nn.Module, spec: InputSpec, folder: Path) -> list[int]:
    """For every image below `folder`, in their order, whether it is classified right."""
    samples = ImageFolder(str(folder)).samples
    paths = [Path(path) for path, _ in samples]
    batches = view_batches(paths, EvaluationViews(spec), 32, 0)
    predicted = infer_all(network, batches, paths).argmax(dim=1).tolist()
    return [int(p == label) for p, (_, label) in zip(predicted, samples, strict=True)]


def measure(options: argparse.Namespace) -> None:
    for seed in range(options.seeds):
        for name in SETS:
            for per_class in PER_CLASS:
                rows = [r for r in _rows(options.results) if _key(r) == (name, per_class, seed)]
                if {row["method"] for row in rows} >= set(options.methods):
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary, "data")
                    drawn = draw(options.data / name, folder, per_class, seed, options.pilot)
                    for method in options.methods:
                        if method not in {row["method"] for row in rows}:
                            rows.append(_row(method, drawn, options, rows))
                            with options.results.open("a") as file:
                                file.write(json.dumps(rows[-1]) + "\n")


def _row(method: str, drawn: Draw, options: argparse.Namespace, others: list[Row]) -> Row:
    started, settings = time.monotonic(), METHODS[method]
    row: Row = {"set": drawn.name, "per_class": drawn.per_class, "seed": drawn.seed}
    row |= {"method": method, "settled": None}
    plan = settle(drawn, options, settings if isinstance(settings, dict) else {})
    spec = plan.classifier.input_spec
    if isinstance(settings, int):
        network = train_by_hand(drawn, options, spec, settings)
    else:
        config = plan.config
        row["settled"] = [config.mode, config.train_stages, plan.probed]
        if twin := next((r for r in others if r["settled"] == row["settled"]), None):
            # The same settings give the same weights: auto chose what was trained already.
            return row | {"correct": twin["correct"], "seconds": twin["seconds"]}
        network = train_cnnft(plan)
    row["seconds"] = round(time.monotonic() - started, 1)
    row["correct"] = is_correct(network, spec, drawn.folder / "test")
    print(*(value for key, value in row.items() if key != "correct"),
          f"{np.mean(row['correct']):.3f}", flush=True)  # fmt: skip
    return row


def _rows(path: Path) -> Iterator[Row]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _key(row: Row) -> tuple[str, int, int]:
    return row["set"], row["per_class"], row["seed"]


def report(rows: list[Row], epochs: int, size: int) -> str:
    """Markdown: accuracies, and differences from the tutorial loop with 95 % intervals."""
    seeds = sorted({row["seed"] for row in rows})
    cells = [(name, n) for name in SETS for n in PER_CLASS]
    correct = {
        (method, cell): np.array(
            [
                row["correct"]
                for seed in seeds
                for row in rows
                if (row["method"], row["set"], row["per_class"], row["seed"])
                == (method, *cell, seed)
            ],
            dtype=np.int8,
        )
        for method in METHODS
        for cell in cells
    }
    head = " | ".join(f"{name}, {n}" for name, n in cells)
    lines = [f"| method | {head} | mean |", "|---" * (len(cells) + 2) + "|"]
    for method in METHODS:
        means = [100 * correct[method, cell].mean() for cell in cells]
        texts = [f"{mean:.1f}" for mean in (*means, np.mean(means))]
        lines.append(f"| {method} | {' | '.join(texts)} |")
    for baseline in list(METHODS)[:2]:
        lines += ["", f"Difference from the {baseline}, in points, with 95 % intervals:", ""]
        lines += [f"| method | {head} | mean |", "|---" * (len(cells) + 2) + "|"]
        for method in METHODS:
            if method != baseline:
                drawn = [
                    _differences(correct[method, cell] - correct[baseline, cell]) for cell in cells
                ]
                texts = [_interval(draws) for draws in (*drawn, np.mean(drawn, axis=0))]
                lines.append(f"| {method} | {' | '.join(texts)} |")
    chosen = [
        f"{name} {n}: {_words(row['settled'])} (draw {row['seed']})"
        for name, n in cells
        for row in rows
        if (row["method"], row["set"], row["per_class"]) == ("auto", name, n)
    ]
    counts = ", ".join(f"{name} {correct['auto', (name, 20)].shape[1]}" for name in SETS)
    lines += [
        "",
        f"Draws with seeds {', '.join(map(str, seeds))}; {epochs} epochs, {size} px, "
        f"scored on val/: {counts} images; torch {torch.__version__}, CPU, one thread.",
        "",
        "auto chose: " + "; ".join(chosen) + ".",
    ]
    return "\n".join(lines)


def _differences(paired: np.ndarray) -> np.ndarray:
    """The mean difference, then bootstrap replicates over draws (rows) and images (columns)."""
    random = np.random.default_rng(0)
    draws, images = paired.shape
    replicates = [
        paired[random.integers(draws, size=draws)][:, random.integers(images, size=images)].mean()
        for _ in range(REPLICATES)
    ]
    return 100 * np.array([paired.mean(), *replicates])


def _interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return f"{draws[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


def _words(settled: list[Any]) -> str:
    mode, stages, probe = settled
    return mode + ("" if stages is None else f", last {stages}") + (", probe" if probe else "")


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
    options = parser.parse_args()
    measure(options)
    if not options.pilot:
        text = report(list(_rows(options.results)), options.epochs, options.size)
        fill(DOCUMENT, "table", text)


if __name__ == "__main__":
    main()
