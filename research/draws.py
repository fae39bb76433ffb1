"""Methods measured on small draws of data sets; writes the tables of four documents.

    python -m research.draws --table modes --data DIR --weights DIR --results FILE
    python -m research.draws --table recipes --data DIR --weights DIR --results FILE
    python -m research.draws --table statistics --data DIR --weights DIR --results FILE --pilot
    python -m research.draws --table views --data DIR --weights DIR --results FILE

For each data set, a number of images per class is drawn from train/; what needs validation images
has them split 80 : 20, cnnft by itself. All methods are scored on val/, which nothing was chosen
on. All methods see the same draws, weights and image size. Results are appended
to --results as they come, so that an interrupted run goes on; two processes can measure different
--seeds, and a call with all of them then makes the table. --pilot scores on the images of train/
that were not drawn instead, which is where choices are made. A cell of a table that lacks a method
or a draw is left out, and named. --write-only measures nothing: the table is of the results.
"""

import argparse
import gzip
import hashlib
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_calibration_error
from torchvision.datasets import ImageFolder

from benchmarks import tutorial
from cnnft import Config, load
from cnnft.config.recipes import RECIPES
from cnnft.data.augmentation import training_transform
from cnnft.data.images import read_image
from cnnft.data.loading import Loading, view_batches
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import collect, predict_batches
from cnnft.training.finetune import run_plan
from cnnft.training.plan import Plan, prepare
from tools.document import fill
from tools.tally import machine

SETS = ("flowers", "hymenoptera", "textures", "trash", "xray")
PER_CLASS = (20, 50)
DOCUMENTS = Path(__file__).parents[1] / "docs"
REPLICATES = 2000
BINS = 15  # of the calibration error
SIDE = 160  # of the reduced files, in pixels: decoding is not what is measured

Settings = dict[str, Any]
"""Of cnnft's `Config`, where they differ from its defaults."""


@dataclass(frozen=True)
class Table:
    """What is compared, and where that is written."""

    document: Path
    marker: str
    methods: "dict[str, Settings | int | Method | None]"
    """A number is the tutorial loop written by hand, in batches of that size; None is
    scikit-learn's logistic regression on frozen features."""
    baselines: tuple[str, ...]
    """The methods that the others are compared with."""
    timed: str
    """The method that times are shares of."""
    common: Settings
    """Of every method that does not say otherwise."""
    complete: bool
    """With calibration and time."""


MODES = Table(
    document=DOCUMENTS / "how-much-to-train.md",
    marker="table",
    methods={
        "scikit-learn": None,
        "tutorial loop, batches of 32": 32,
        "feature-extractor": {"mode": "feature-extractor"},
        "feature-extractor, last layer": {"mode": "feature-extractor", "features": "last"},
        "bn-only": {"mode": "bn-only"},
        "last stage": {"mode": "finetune", "train_stages": 1},
        "recipe standard": {"mode": "finetune", **RECIPES["standard"].settings},
        "finetune": {"mode": "finetune"},
        "auto": {"mode": "auto"},
        "auto, ensemble": {"mode": "auto", "ensemble": True},
    },
    baselines=("scikit-learn",),
    timed="finetune",
    common={"epochs": 10},
    complete=True,
)

BY_NAME = Table(
    document=DOCUMENTS / "recipes.md",
    marker="table",
    methods={
        "tutorial": RECIPES["tutorial"].settings,
        "tutorial, batches of 32": RECIPES["tutorial"].settings | {"batch_size": 32},
        "no recipe": {"mode": "finetune"},
        **{name: RECIPES[name].settings for name in ("fast", "standard", "thorough")},
    },
    baselines=("tutorial", "tutorial, batches of 32"),
    timed="tutorial",
    common={},
    complete=True,
)

STATISTICS = Table(
    document=DOCUMENTS / "losses-and-averages.md",
    marker="statistics",
    methods={
        "running averages": {"recalibrate_bn": False},
        "recomputed (default)": {},
        "frozen": {"batchnorm": "frozen"},
        "frozen, the full rate": {"batchnorm": "frozen", "lr": 0.1 * 32 / 256 / 10},
    },
    baselines=("running averages",),
    timed="running averages",
    common={"mode": "finetune", "epochs": 10},
    complete=True,
)

VIEWS = Table(
    document=DOCUMENTS / "speed.md",
    marker="views",
    methods={f"K = {k}": {"feature_views": k} for k in (25, 1, 2, 4, 8)},
    baselines=("K = 25",),
    timed="K = 25",
    # Not on the disk, where one method would find what another has computed.
    common={
        "mode": "feature-extractor",
        "head_solver": "sgd",
        "epochs": 25,
        "cache": "ram",
    },
    complete=True,
)

TABLES = {"modes": MODES, "recipes": BY_NAME, "statistics": STATISTICS, "views": VIEWS}

Cell = tuple[str, int]
"""A data set, and how many images of each class are drawn."""

Row = dict[str, Any]
"""set, per_class, seed, method, the settings it came to, measured_on (what machine), seconds of
wall time and of processor time, chance (the share of the commonest class), loss (the mean
log-loss), answer (of mode auto: what it took), and per image correct (0 or 1) and confidence (the
probability of the predicted class)."""


@dataclass(frozen=True)
class Draw:
    """Images of one data set on disk, reduced: all/ to learn from, which are in train/ and val/
    too, and test/."""

    folder: Path
    name: str
    per_class: int
    seed: int


Answers = Callable[[Path], tuple[Tensor, list[int]]]
"""A folder of images -> (logits, labels)."""

Method = Callable[[Draw, argparse.Namespace], Answers]
"""Anything else that learns from a draw (research/pilots.py)."""


def draw(source: Path, target: Path, per_class: int, seed: int, pilot: bool) -> Draw:
    for folder in sorted(path for path in (source / "train").iterdir() if path.is_dir()):
        files = sorted(folder.iterdir(), key=lambda path: _rank(seed, path))
        inside = round(0.8 * per_class)
        _reduce(files[:inside], target / "train" / folder.name)
        _reduce(files[inside:per_class], target / "val" / folder.name)
        _reduce(files[:per_class], target / "all" / folder.name)
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


def settle(drawn: Draw, options: argparse.Namespace, settings: Settings) -> Plan:
    return prepare(
        Config.of(
            drawn.folder / "all",
            backbone=f"local-dir:{options.weights}",
            image_size=options.size,
            seed=drawn.seed,
            workers=0,
            runs_dir=drawn.folder.parent / "runs",
            device=options.device,
            **settings,
        )
    )


def train_cnnft(plan: Plan) -> tuple[Classifier, str | None]:
    """(what it made, of mode auto the answer)."""
    for event in run_plan(plan):
        finished = event
    found = finished.run.comparison()
    answer = (found.answer if found else "head, nothing trained") if plan.compares else None
    return load(finished.run.path, device=str(plan.device)), answer


def fit_scikit_learn(drawn: Draw, options: argparse.Namespace, spec: InputSpec) -> Answers:
    """Logistic regression on the frozen features of all images."""
    network = timm.create_model(f"local-dir:{options.weights}", pretrained=True, num_classes=0)
    network.to(options.device)

    def features(folder: Path) -> tuple[Tensor, list[int]]:
        paths, labels = _listed(folder)
        batches = view_batches(paths, EvaluationViews(spec), Loading(32, 0))
        return collect(predict_batches(network, batches), paths), labels

    # Warm-started from no penalty to the next: the solver's other settings are its defaults.
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(max_iter=2000))
    model.fit(*features(drawn.folder / "all"))

    def logits(folder: Path) -> tuple[Tensor, list[int]]:
        values, labels = features(folder)
        return torch.tensor(model.predict_log_proba(values)).float(), labels

    return logits


def train_by_hand(
    drawn: Draw, options: argparse.Namespace, plan: Plan, batch_size: int
) -> torch.nn.Module:
    """The tutorial loop with its rate and schedule, and the best epoch on val."""
    torch.manual_seed(drawn.seed)
    spec = plan.classifier.input_spec
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
    network.to(options.device)
    optimizer = tutorial.make_optimizer(network)
    scheduler = StepLR(optimizer, step_size=7, gamma=0.1)
    best, kept = -1.0, None
    for _ in range(plan.config.training.epochs):
        tutorial.train_epoch(network, loaders["train"], optimizer, scheduler)
        current = tutorial.accuracy(network, loaders["val"])
        if current > best:
            best, kept = current, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(kept)
    return network


def _listed(folder: Path) -> tuple[list[Path], list[int]]:
    """The images below it, in the order of their names, and their labels."""
    samples = ImageFolder(str(folder)).samples
    return [Path(path) for path, _ in samples], [label for _, label in samples]


def classify(network: torch.nn.Module, spec: InputSpec, folder: Path) -> tuple[Tensor, list[int]]:
    """(logits, labels) of every image below `folder`, in their order."""
    paths, labels = _listed(folder)
    batches = view_batches(paths, EvaluationViews(spec), Loading(32, 0))
    return collect(predict_batches(network, batches), paths), labels


def scored(logits: Tensor, labels: list[int]) -> Row:
    """What a row says of them."""
    highest, predicted = logits.softmax(dim=1).max(dim=1)
    return {
        "chance": max(Counter(labels).values()) / len(labels),
        "loss": round(float(cross_entropy(logits, torch.tensor(labels))), 4),
        "correct": (predicted == torch.tensor(labels)).int().tolist(),
        "confidence": [round(p, 4) for p in highest.tolist()],
    }


def measure(table: Table, options: argparse.Namespace) -> None:
    for seed in options.seeds:
        for name in options.sets:
            for per_class in options.per_class:
                cell = (name, per_class, seed)
                rows = [r for r in read_rows(options.results) if _cell(r) == cell]
                missing = set(options.methods) - {row["method"] for row in rows}
                if not missing:
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary, "data")
                    drawn = draw(options.data / name, folder, per_class, seed, options.pilot)
                    for method in [m for m in options.methods if m in missing]:
                        row = _row(table, method, drawn, options)
                        with options.results.open("a") as file:
                            file.write(json.dumps(row) + "\n")


def _row(table: Table, method: str, drawn: Draw, options: argparse.Namespace) -> Row:
    row: Row = {"set": drawn.name, "per_class": drawn.per_class, "seed": drawn.seed}
    row |= {"method": method, "settled": None}
    row["measured_on"] = f"{options.device}, {machine()}"
    settings = table.methods[method]
    wall, processor = time.monotonic(), time.process_time()
    own = settings if isinstance(settings, dict) else {}
    plan = settle(drawn, options, table.common | own)
    spec, test = plan.classifier.input_spec, drawn.folder / "test"
    if settings is None:
        answers = fit_scikit_learn(drawn, options, spec)
    elif callable(settings):
        answers = settings(drawn, options)
    elif isinstance(settings, int):
        network = train_by_hand(drawn, options, plan, settings)
        answers = partial(classify, network, spec)
    else:
        row["settled"] = _settled(plan.asked)
        classifier, row["answer"] = train_cnnft(plan)
        answers = partial(classify, classifier.calibrated(classifier.network), spec)
    row["seconds"] = round(time.monotonic() - wall, 1)
    row["processor_seconds"] = round(time.process_time() - processor, 1)
    row |= scored(*answers(test))
    print(*_cell(row), method, row["seconds"], row["processor_seconds"],
          f"{np.mean(row['correct']):.3f} {calibration_error(row):.3f}", flush=True)  # fmt: skip
    return row


def _settled(config: Config) -> Settings:
    """All settings but where things are."""
    paths = ("data", "runs_dir", "backbone")
    return {key: value for key, value in config.to_dict().items() if key not in paths}


def read_rows(path: Path) -> list[Row]:
    """Of a file of JSON lines, which may be compressed."""
    if not path.exists():
        return []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def _cell(row: Row) -> tuple[str, int, int]:
    return row["set"], row["per_class"], row["seed"]


def calibration_error(row: Row) -> float:
    """Expected calibration error of the predicted classes (Naeini et al., 2015)."""
    confidence, correct = torch.tensor(row["confidence"]), torch.tensor(row["correct"])
    return float(binary_calibration_error(confidence, correct, n_bins=BINS, norm="l1"))


class Report:
    """Markdown tables: a row for each method, a column for each data set and size of draw."""

    def __init__(self, table: Table, options: argparse.Namespace) -> None:
        self.table, self.methods, self.seeds = table, options.methods, options.seeds
        self.rows = {(row["method"], *_cell(row)): row for row in read_rows(options.results)}
        cells = [(name, n) for n in options.per_class for name in options.sets]
        self.cells = [cell for cell in cells if self._is_complete(cell)]
        self.missing = [cell for cell in cells if cell not in self.cells]
        self.lines: list[str] = []

    def text(self, size: int) -> str:
        """Accuracies, differences from the baselines, and what else the table wants."""
        chance = [self._draws(self.methods[0], cell)[0]["chance"] for cell in self.cells]
        accuracies = {"always the commonest class": chance}
        accuracies |= self._each(lambda method, cell: self._correct(method, cell).mean())
        self._add(accuracies, points)
        for baseline in self.table.baselines:
            self.lines += ["", f"Difference from the {baseline}, in points, with 95 % intervals:"]
            differences = self._each(lambda m, cell, b=baseline: self._difference(m, b, cell))
            del differences[baseline]
            self._add(differences, interval)
        if self.table.complete:
            self._add_calibration_and_time()
        if "auto" in self.methods:
            self.lines += ["", f"auto chose: {self._chosen()}."]
        images = ", ".join(f"{name} {n}: {self._correct(self.methods[0], (name, n)).shape[1]}"
                           for name, n in self.cells)  # fmt: skip
        common = "".join(f"{value} {key}, " for key, value in self.table.common.items())
        self.lines += [
            "",
            f"Draws with seeds {', '.join(map(str, self.seeds))}; {common}{size} px; images that "
            f"score: {images}; {'; '.join(sorted({row['measured_on'] for row in self._used()}))}.",
        ]
        if self.missing:
            names = ", ".join(f"{name} {n}" for name, n in self.missing)
            self.lines += ["", f"Not measured with every method: {names}."]
        return "\n".join(self.lines[1:])

    def _is_complete(self, cell: Cell) -> bool:
        """Whether every method has all draws."""
        return all((m, *cell, seed) in self.rows for m in self.methods for seed in self.seeds)

    def _add_calibration_and_time(self) -> None:
        self.lines += ["", f"Expected calibration error, in points, {BINS} bins:"]
        errors = self._each(
            lambda method, cell: np.mean([*map(calibration_error, self._draws(method, cell))])
        )
        self._add(errors, points)
        self.lines += ["", "Mean log-loss:"]
        losses = self._each(
            lambda method, cell: np.mean([row["loss"] for row in self._draws(method, cell)])
        )
        self._add(losses, lambda loss: f"{loss:.3f}")
        first = self.table.timed
        self.lines += [
            "",
            f"Time, in the {first}'s on the same draw (in brackets: the processor's time), where "
            "both were measured on the same machine:",
        ]
        self._add(self._each(lambda method, cell: self._times(method, first, cell)), _multiples)

    def _draws(self, method: str, cell: Cell) -> list[Row]:
        return [self.rows[method, *cell, seed] for seed in self.seeds]

    def _used(self) -> list[Row]:
        return [row for m in self.methods for cell in self.cells for row in self._draws(m, cell)]

    def _correct(self, method: str, cell: Cell) -> np.ndarray:
        """(draws, images) of 0 and 1."""
        return np.array([row["correct"] for row in self._draws(method, cell)], dtype=np.int8)

    def _difference(self, method: str, baseline: str, cell: Cell) -> np.ndarray:
        return differences(self._correct(method, cell) - self._correct(baseline, cell))

    def _times(self, method: str, baseline: str, cell: Cell) -> np.ndarray:
        """Of the wall's clock and of the processor's: the mean over draws; NaN where the two were
        not measured on the same machine.
        """
        both = zip(self._draws(method, cell), self._draws(baseline, cell), strict=True)
        if any(one["measured_on"] != other["measured_on"] for one, other in both):
            return np.full(2, np.nan)
        spent, other = (
            np.array([[row["seconds"], row["processor_seconds"]] for row in self._draws(m, cell)])
            for m in (method, baseline)
        )
        return (spent / other).mean(axis=0)

    def _chosen(self) -> str:
        return "; ".join(
            f"{name} {n}: {row['answer']} (draw {row['seed']})"
            for name, n in self.cells
            for row in self._draws("auto", (name, n))
        )

    def _each(self, value: Callable[[str, Cell], Any]) -> dict[str, list[Any]]:
        return {method: [value(method, cell) for cell in self.cells] for method in self.methods}

    def _add(self, rows: dict[str, list[Any]], words: Callable[[Any], str]) -> None:
        head = " | ".join(f"{name}, {n}" for name, n in self.cells)
        self.lines += ["", f"| method | {head} | mean |", "|---" * (len(self.cells) + 2) + "|"]
        for method, values in rows.items():
            with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # none is left
                texts = [words(value) for value in (*values, np.nanmean(values, axis=0))]
            self.lines.append(f"| {method} | {' | '.join(texts)} |")


def differences(paired: np.ndarray) -> np.ndarray:
    """The mean difference, then bootstrap replicates over draws (rows) and images (columns)."""
    random = np.random.default_rng(0)
    draws, images = paired.shape
    replicates = [
        paired[random.integers(draws, size=draws)][:, random.integers(images, size=images)].mean()
        for _ in range(REPLICATES)
    ]
    return 100 * np.array([paired.mean(), *replicates])


def interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return f"{draws[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


def points(share: float) -> str:
    return f"{100 * share:.1f}"


def _multiples(times: np.ndarray) -> str:
    wall, processor = times
    if np.isnan(wall):
        return ""
    return f"{wall:.2f} ({processor:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=list(TABLES), required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="a folder in timm's layout")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-only", action="store_true", help="from the results that there are")
    parser.add_argument("--measure-only", action="store_true", help="write no table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--per-class", nargs="+", type=int, default=PER_CLASS)
    parser.add_argument("--methods", nargs="+", default=[], help="besides the baselines; or all")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--candidates", type=Path, help="with --pilot: more methods, as JSON")
    options = parser.parse_args()
    if options.candidates and not options.pilot:
        parser.error("--candidates are chosen from with --pilot, before the table is made")
    if not options.write_only and None in (options.data, options.weights):
        parser.error("give --data and --weights to measure, or --write-only")
    table = TABLES[options.table]
    if options.candidates:
        table.methods.update(json.loads(options.candidates.read_text()))
    if unknown := set(options.methods) - table.methods.keys():
        parser.error(f"unknown --methods: {', '.join(sorted(unknown))}")
    wanted = {*table.baselines, *(options.methods or table.methods)}
    options.methods = [method for method in table.methods if method in wanted]
    if not options.write_only:
        measure(table, options)
    if options.measure_only:
        return
    text = Report(table, options).text(options.size)
    if options.candidates:
        print(text)
    else:
        fill(table.document, table.marker, text)


if __name__ == "__main__":
    main()
