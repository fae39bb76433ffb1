"""Pilots of what might make fine-tuning, or the solved head, stronger; writes a table of
docs/how-much-to-train.md.

    python -m research.pilots --data DIR --weights DIR --results FILE
    python -m research.pilots --write-only --results docs/results/pilots.jsonl.gz

One small draw of three data sets, chosen and scored on parts of train/: a pilot tells what deserves
a real comparison (research/draws.py, whose draws and scores these are), not what is better.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from cnnft import load
from cnnft.config.recipes import RECIPES
from cnnft.data.loading import Loading, view_batches
from cnnft.data.transforms import EvaluationViews
from cnnft.inference.calibrate import calibrate
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import collect, predict_batches
from cnnft.inference.predictions import Predictions
from cnnft.models.freezing import learning_statistics
from cnnft.models.heads import classifier_layer
from cnnft.probe.probe import install
from cnnft.probe.solve import PENALTIES, Linear
from cnnft.probe.solve import Path as Penalised
from cnnft.runs.run import Run
from cnnft.training.averaging import recalibrate
from cnnft.training.begin import make_state
from cnnft.training.feed import Feed
from cnnft.training.finetune import run_plan
from cnnft.training.losses import Objective, make_objective
from cnnft.training.plan import Plan
from cnnft.training.selection import Validated, validated
from cnnft.training.solved import Found, Solving
from cnnft.training.step import AUXILIARY_WEIGHT, EpochDone, train
from research.draws import (
    DOCUMENTS,
    Answers,
    Draw,
    Method,
    Row,
    Table,
    calibration_error,
    classify,
    differences,
    interval,
    measure,
    points,
    read_rows,
    settle,
)
from tools.document import fill

SETS = ("hymenoptera", "textures", "xray")
PER_CLASS = 50
SEED = 0
EPOCHS = {"epochs": 10}
STANDARD = {"mode": "finetune", **RECIPES["standard"].settings}
T = TypeVar("T")
Rows = tuple[Tensor, Tensor]
"""Features (n, D), and for each the probabilities of the classes (n, C); float64."""


def once(make: Callable[[Draw, argparse.Namespace], T]) -> Callable[..., T]:
    """`make`, called once for each draw: several pilots begin with the same."""
    made: dict[Draw, T] = {}

    def get(drawn: Draw, options: argparse.Namespace) -> T:
        if drawn not in made:
            made.clear()
            made[drawn] = make(drawn, options)
        return made[drawn]

    return get


def answers(classifier: Classifier) -> Answers:
    return partial(classify, classifier.calibrated(classifier.network), classifier.input_spec)


# ---------------------------------------------------------------- fine-tuning


@dataclass(frozen=True)
class Weights:
    """Of a network, and what validation found of it."""

    tensors: dict[str, Tensor]
    found: Validated


class FineTuning:
    """Training as cnnft does it; a pilot changes its `state` or `objective` before the steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.network = plan, plan.classifier.network
        self.state = make_state(plan, ())
        self.objective: Objective = make_objective(plan.config.loss, plan.train.counts())
        self.feed = Feed(plan)
        for _ in self.feed.prepare(lambda: False):
            pass

    def run(self) -> list[Weights]:
        """At the start, and after each epoch."""
        found = [self.weights()]
        for event in train(self.state, self.feed.training(0), self.objective):
            if isinstance(event, EpochDone):
                self.recalibrate()
                found.append(self.weights())
        return found

    def recalibrate(self) -> None:
        names = learning_statistics(self.network, self.state.keep_statistics)
        layers = [self.network.get_submodule(name) for name in names]
        recalibrate(self.network, layers, (pixels for pixels, _ in self.feed.first))

    def weights(self) -> Weights:
        """The network's as they are."""
        val, batches = self.plan.val, predict_batches(self.network, self.feed.validation)
        found = validated(Predictions(val, collect(batches, val.paths), "val"), balanced=False)
        return Weights({k: v.clone() for k, v in self.network.state_dict().items()}, found)

    def answers(self, candidates: list[Weights]) -> Answers:
        """Of the one with the lowest log-loss on val after temperature; of equals the first."""
        best = min(candidates, key=lambda weights: weights.found.calibrated_loss)
        classifier = replace(self.plan.classifier, temperature=best.found.temperature)

        def answer(folder: Path) -> tuple[Tensor, list[int]]:
            self.network.load_state_dict(best.tensors)
            return answers(classifier)(folder)

        return answer


def begin(drawn: Draw, options: argparse.Namespace) -> FineTuning:
    return FineTuning(settle(drawn, options, {"mode": "finetune", **EPOCHS}))


@once
def default(drawn: Draw, options: argparse.Namespace) -> tuple[FineTuning, list[Weights]]:
    tuning = begin(drawn, options)
    return tuning, tuning.run()


def finetune(drawn: Draw, options: argparse.Namespace) -> Answers:
    tuning, found = default(drawn, options)
    return tuning.answers(found)


def interpolated(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict:
    """(1 - share) · start + share · end (WiSE-FT: Wortsman et al., 2022); counts are the end's."""
    return {
        name: start[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def wise_ft(*shares: float) -> Method:
    """The start's weights with a share of the last epoch's, BatchNorm statistics recomputed."""

    def method(drawn: Draw, options: argparse.Namespace) -> Answers:
        tuning, found = default(drawn, options)
        return tuning.answers([mixed_with(tuning, found[0], found[-1], s) for s in shares])

    return method


def mixed_with(tuning: FineTuning, start: Weights, end: Weights, share: float) -> Weights:
    tuning.network.load_state_dict(interpolated(start.tensors, end.tensors, share))
    if share > 0:  # the start keeps its pretrained statistics
        tuning.recalibrate()
    return tuning.weights()


def l2_sp(network: nn.Module, origin: dict[str, Tensor], alpha: float, beta: float) -> Tensor:
    """α/2 · ‖w - w⁰‖² + β/2 · ‖v‖², v being the weights that `origin` lacks: the head's
    (L2-SP: Li, Grandvalet and Davoine, 2018).
    """
    penalties = [
        alpha / 2 * (p - origin[name]).square().sum()
        if name in origin
        else beta / 2 * p.square().sum()
        for name, p in network.named_parameters()
    ]
    return torch.stack(penalties).sum()


def pulled(alpha: float, beta: float = 0.01) -> Method:
    def method(drawn: Draw, options: argparse.Namespace) -> Answers:
        tuning = begin(drawn, options)
        network, head = tuning.network, tuning.plan.classifier.head
        origin = {n: p.detach().clone() for n, p in network.named_parameters() if n not in head}
        tuning.state.before_step = lambda: l2_sp(network, origin, alpha, beta).backward()
        return tuning.answers(tuning.run())

    return method


class TwoHeads(nn.Module):
    """A network of timm's that gives the logits of the pretrained classifier too."""

    def __init__(self, network: nn.Module, head: nn.Module, pretrained: nn.Module) -> None:
        super().__init__()
        self.network, self.head, self.pretrained = network, head, pretrained

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.network.forward_features(pixels)
        features = self.network.forward_head(maps, pre_logits=True)
        return self.head(features), self.pretrained(features)


def by_bayes(conditional: Tensor, marginal: Tensor) -> Tensor:
    """p(t | s) (S, T) and p(s) (S,) -> p(s | t), (T, S)."""
    joint = conditional * marginal[:, None]
    return (joint / joint.sum(dim=0)).T


def relationship(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(T, S): p(pretrained class | class), from the pretrained classifier's probabilities (N, S).

    As You et al. (2020) learn it: p(class | pretrained class) is a logistic regression without
    intercept, whose penalty is chosen by its log-loss out of fold.
    """
    model = LogisticRegressionCV(
        Cs=np.logspace(-4, 4, 9), fit_intercept=False, scoring="neg_log_loss", max_iter=1000
    )
    model.fit(probabilities.double().numpy(), labels.numpy())
    conditional = torch.tensor(model.predict_proba(np.eye(probabilities.shape[1])))
    return by_bayes(conditional, probabilities.double().mean(dim=0)).float()


def co_tuning(targets: Tensor, weight: float) -> Objective:
    """Cross-entropy of the labels, and `weight` times that of the pretrained classifier's logits
    with targets[label] (S,), which training takes for an auxiliary classifier's.
    """

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[1] != targets.shape[1]:
            return cross_entropy(logits, labels, reduction="sum")
        other = cross_entropy(logits, targets[labels], reduction="sum")
        return weight / AUXILIARY_WEIGHT * other

    return objective


def co_tuned(weight: float) -> Method:
    def method(drawn: Draw, options: argparse.Namespace) -> Answers:
        tuning = begin(drawn, options)
        plan, network, samples = tuning.plan, tuning.network, tuning.plan.train
        original = timm.create_model(f"local-dir:{options.weights}", pretrained=True)
        views = EvaluationViews(plan.classifier.input_spec)
        batches = predict_batches(original, view_batches(samples.paths, views, Loading(32, 0)))
        probabilities = collect(batches, samples.paths).softmax(dim=1)
        targets = relationship(probabilities, torch.tensor(samples.labels))
        _, head = classifier_layer(network, plan.classifier.head)
        pretrained, rate = original.get_classifier(), plan.rates.backbone
        tuning.state.forward_module = TwoHeads(network, head, pretrained)
        tuning.state.optimizer.add_param_group(
            {"params": [*pretrained.parameters()], "name": "pretrained", "lr": rate}
            | {"initial_lr": rate}
        )
        tuning.objective = co_tuning(targets, weight)
        return tuning.answers(tuning.run())

    return method


# ---------------------------------------------------------------- the solved head


@once
def solved(drawn: Draw, options: argparse.Namespace) -> tuple[Solving, Found]:
    plan = settle(drawn, options, {"mode": "feature-extractor"})
    with Run.create(plan.asked, "head") as run:
        solving = Solving(plan, run)
        for _ in solving.events(lambda: False):
            pass
    assert solving.found is not None
    return solving, solving.found


Augment = Callable[[Rows, np.random.Generator], Rows]
"""Rows that are trained on too, made from those."""


def nothing(rows: Rows, random: np.random.Generator) -> Rows:
    return rows[0][:0], rows[1][:0]


def within_class_noise(scale: float) -> Augment:
    """Each row with normal noise, whose covariance is scale² times that within the classes."""

    def augment(rows: Rows, random: np.random.Generator) -> Rows:
        values, targets = rows
        means = targets.T @ values / targets.sum(dim=0)[:, None]
        residuals = values - targets @ means
        # Normal combinations of the residuals have their covariance.
        normal = torch.tensor(random.normal(size=(len(values), len(values))))
        freedom = len(values) - targets.shape[1]
        return values + scale * normal @ residuals / math.sqrt(freedom), targets

    return augment


def mixup(alpha: float) -> Augment:
    """Each row mixed with another one (Zhang et al., 2018; of features Verma et al., 2019)."""

    def augment(rows: Rows, random: np.random.Generator) -> Rows:
        order = torch.tensor(random.permutation(len(rows[0])))
        share = torch.tensor(random.beta(alpha, alpha, size=(len(order), 1)))
        values, targets = (of.lerp(of[order], share) for of in rows)
        return values, targets

    return augment


def solve(
    values: Tensor, labels: Tensor, classes: int, folds: Tensor, augment: Augment
) -> tuple[Linear, float]:
    """(the head, its temperature), as `cnnft.probe.solve` with rows of `augment` beside the views
    (V, N, D); what is out of fold augments nothing. The search ends where the log-loss rises.
    """

    def path(kept: Tensor) -> Penalised:
        targets = one_hot(labels[kept], classes).double().repeat(len(values), 1)
        rows = values[:, kept].flatten(0, 1).double(), targets
        more = augment(rows, np.random.default_rng(0))
        return Penalised(*(torch.cat(pair) for pair in zip(rows, more, strict=True)), classes)

    parts = [(folds == fold, path(folds != fold)) for fold in folds.unique()]
    best, chosen, temperature = math.inf, PENALTIES[0], 1.0
    for penalty in PENALTIES:
        logits = torch.empty(len(labels), classes, dtype=torch.float64)
        for held_out, rest in parts:
            logits[held_out] = rest.fit(penalty)(values[0, held_out])
        found = calibrate(logits, labels)
        if found.loss >= best:
            break
        best, chosen, temperature = found.loss, penalty, found.temperature
    return path(torch.ones_like(folds, dtype=torch.bool)).fit(chosen), temperature


def augmented(augment: Augment) -> Method:
    def method(drawn: Draw, options: argparse.Namespace) -> Answers:
        solving, found = solved(drawn, options)
        values = torch.stack([found.reading.inputs(view) for view in found.views])
        classifier = found.reading.classifier
        classes = len(classifier.classes)
        linear, temperature = solve(values, solving.labels, classes, solving.folds, augment)

        def answer(folder: Path) -> tuple[Tensor, list[int]]:
            install(classifier.network, classifier.head, linear)
            return answers(replace(classifier, temperature=temperature))(folder)

        return answer

    return method


# ---------------------------------------------------------------- one network for an ensemble


@once
def ensemble(drawn: Draw, options: argparse.Namespace) -> Run:
    plan = settle(drawn, options, {"mode": "auto", "ensemble": True, **EPOCHS})
    *_, finished = run_plan(plan)
    return finished.run


def of_the_ensemble(part: str) -> Method:
    """What lies there in the run of the ensemble; "" is the ensemble itself."""
    return lambda drawn, options: answers(load(ensemble(drawn, options).path / part))


def distilled(weight: float) -> Method:
    """The ensemble's other network, trained with it as teacher."""

    def method(drawn: Draw, options: argparse.Namespace) -> Answers:
        taught = {"teacher": (str(ensemble(drawn, options).path),), "distill_weight": weight}
        *_, finished = run_plan(settle(drawn, options, STANDARD | taught))
        return answers(load(finished.run.path))

    return method


# ---------------------------------------------------------------- the table

HEAD, FINETUNE, OTHER = "solved head", "finetune", "recipe standard"
METHODS: dict[str, tuple[Method | None, str | None]] = {
    "scikit-learn": (None, None),
    HEAD: (augmented(nothing), None),
    "mixup of features": (augmented(mixup(1)), HEAD),
    "noise of half the spread within classes": (augmented(within_class_noise(0.5)), HEAD),
    "noise of their whole spread": (augmented(within_class_noise(1)), HEAD),
    FINETUNE: (finetune, None),
    "WiSE-FT, half and half": (wise_ft(0.5), FINETUNE),
    "WiSE-FT, the share chosen on val": (wise_ft(0, 0.25, 0.5, 0.75, 1), FINETUNE),
    "L2-SP, α = 0.1": (pulled(0.1), FINETUNE),
    "Co-Tuning, λ = 2.3": (co_tuned(2.3), FINETUNE),
    "ensemble": (of_the_ensemble(""), HEAD),
    OTHER: (of_the_ensemble("candidates/last-stages"), None),
    "its distillation from the ensemble": (distilled(0.9), OTHER),
    "L2-SP, α = 1": (pulled(1), FINETUNE),
    "Co-Tuning, λ = 0.5": (co_tuned(0.5), FINETUNE),
}
"""With the method that each is compared with."""

TABLE = Table(
    document=DOCUMENTS / "how-much-to-train.md",
    marker="pilots",
    methods={name: method for name, (method, _) in METHODS.items()},
    baselines=(),
    timed=FINETUNE,
    common=EPOCHS,
    complete=False,
)


def text(rows: list[Row], size: int) -> str:
    """A row for each method that was measured on every set."""
    found = {(row["method"], row["set"]): row for row in rows}
    of = {m: [found[m, s] for s in SETS if (m, s) in found] for m in METHODS}
    of = {method: rows for method, rows in of.items() if len(rows) == len(SETS)}
    chance = [row["chance"] for row in of[FINETUNE]]
    accuracies = {"always the commonest class": chance} | {
        method: [np.mean(row["correct"]) for row in rows] for method, rows in of.items()
    }
    lines = [
        f"| method | {' | '.join(SETS)} | mean | log-loss | calibration error | beside |  |",
        "|---" * (len(SETS) + 6) + "|",
    ]
    for method, shares in accuracies.items():
        cells = [points(share) for share in (*shares, np.mean(shares))]
        if method in of:
            loss = np.mean([row["loss"] for row in of[method]])
            error = np.mean([calibration_error(row) for row in of[method]])
            cells += [f"{loss:.3f}", points(error)]
            beside = METHODS[method][1]
            cells += [beside, interval(_beside(of[method], of[beside]))] if beside else ["", ""]
        else:
            cells += [""] * 4
        lines.append(f"| {method} | {' | '.join(cells)} |")
    images = ", ".join(f"{row['set']}: {len(row['correct'])}" for row in of[FINETUNE])
    lines += [
        "",
        f"One draw (seed {SEED}) of {PER_CLASS} images per class, {size} px, {EPOCHS['epochs']} "
        f"epochs; images of train/ that score, which were not drawn: {images}. Differences are in "
        "points of accuracy, with 95 % intervals from a bootstrap over images; means of the sets.",
    ]
    return "\n".join(lines)


def _beside(rows: list[Row], others: list[Row]) -> np.ndarray:
    """The mean difference over the sets, then its bootstrap replicates, in points."""
    pairs = zip(rows, others, strict=True)
    each = [differences(np.array([one["correct"]]) - np.array([other["correct"]]))
            for one, other in pairs]  # fmt: skip
    return np.mean(each, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="a folder in timm's layout")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--write-only", action="store_true", help="from the results that there are")
    options = parser.parse_args()
    if not options.write_only and None in (options.data, options.weights):
        parser.error("give --data and --weights to measure, or --write-only")
    if not options.write_only:
        options.pilot, options.seeds, options.per_class = True, [SEED], [PER_CLASS]
        measure(TABLE, options)
    fill(TABLE.document, TABLE.marker, text(read_rows(options.results), options.size))


if __name__ == "__main__":
    main()
