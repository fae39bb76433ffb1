"""`--mode auto`: the solved head, unless a network that was trained too is clearly better."""

import logging
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from cnnft.config.recipes import RECIPES
from cnnft.config.schema import Config
from cnnft.errors import CnnftError
from cnnft.inference.calibrate import calibrate
from cnnft.inference.classifier import Member
from cnnft.inference.predict import Inference, mean_probability, predict
from cnnft.inference.predictions import Predictions
from cnnft.probe.solve import Solved
from cnnft.runs.run import Run
from cnnft.runs.scores import Comparison, Evidence
from cnnft.training.advice import advise_on
from cnnft.training.events import Advised, Event, Finished, Started, Stopped, Trying
from cnnft.training.plan import Plan, prepare
from cnnft.training.selection import calibrated
from cnnft.training.solved import Solving

CANDIDATE: dict[str, Any] = RECIPES["standard"].settings
_FOLDER = "candidates/last-stages"
_STANDARD_ERRORS = 2
"""By which the log-loss on val has to be lower. Ten images per class cannot tell networks apart
that are nearly as good, and then the head is the better bet: it is trained on all images."""
_LEAST_GAIN = 0.05
"""Nats of log-loss that a perfect network would have to gain, for one to be trained."""
_MEMBER = "members/last-stages"
_WEIGHT = 1 / 3
"""Of the trained network in the ensemble. It is that of the last epoch: as an average needs
networks that err differently, the end of training serves better than the best epoch, which may be
the start (pilots on two data sets; half the weight was less accurate)."""

_log = logging.getLogger(__name__)


class Auto:
    """Solves the head, trains a candidate where the evidence leaves room, and compares them."""

    def __init__(self, plan: Plan, run: Run, start: Callable[..., Iterator[Event]]) -> None:
        """`start` trains as planned, as `run_plan` does."""
        self.plan, self.run, self.start = plan, run, start
        self.solving = Solving(plan, run)

    def events(self, stop: Callable[[], bool]) -> Iterator[Event]:
        run, ensemble = self.run, self.plan.config.freezing.ensemble
        if run.comparison() is not None:  # it was compared before
            yield Finished(run, run.metrics())
            return
        for event in self.solving.events(stop):
            if not isinstance(event, Finished):
                yield event
            if isinstance(event, Stopped):
                return
        found = self.solving.found
        assert found is not None
        trains = ensemble or self._has_room(found.solved)
        yield Advised(advise_on(self.plan.train, found.solved.accuracy), trains)
        if trains and (yield from self._compare(stop)):
            return
        yield Finished(run, run.metrics())

    def _has_room(self, head: Solved) -> bool:
        """Whether a perfect network could be told from the head, on as many images as val has."""
        if head.chosen is None:
            return False
        logits = head.chosen.logits / head.temperature
        labels = self.solving.labels[head.scored]
        losses = cross_entropy(logits, labels, reduction="none")
        fraction = self.plan.config.dataset.val_fraction
        n = len(self.plan.val) or max(round(fraction * len(labels)), 1)
        least = max(_LEAST_GAIN, _STANDARD_ERRORS * float(losses.std()) / math.sqrt(n))
        return float(losses.mean()) > least

    def _compare(self, stop: Callable[[], bool]) -> Generator[Event, None, bool]:
        """Returns whether the caller asks to stop."""
        place = self.run.path / _FOLDER
        before = Run.open(place) if Run.is_run(place) else None
        trained: Run | None = None
        try:
            plan = prepare(before.config() if before else self._config(place), before)
            yield Trying(plan)
            for event in self.start(plan, before, stop=stop):
                if isinstance(event, Stopped):
                    yield Stopped(self.run, None)
                    return True
                if isinstance(event, Finished):
                    trained = event.run
                elif not isinstance(event, Started):
                    yield event
        except CnnftError as error:  # the run has a model already
            _log.warning("the head is kept: %s", error)
            return False
        assert trained is not None
        yield self._decide(plan, trained)
        return False

    def _config(self, place: Path) -> Config:
        epochs = min(CANDIDATE["epochs"], self.plan.config.training.epochs)
        own: dict[str, Any] = {"mode": "finetune", "epochs": epochs}
        own |= {"ensemble": False, "force": False}
        own |= {"head_solver": "auto", "features": "auto"}  # which are about the other head
        own |= {"train_stages": min(CANDIDATE["train_stages"], len(self.plan.stages)) or None}
        given = {"runs_dir": place.parent, "name": place.name}
        return self.plan.config.replace(**CANDIDATE | own | given)

    def _decide(self, plan: Plan, trained: Run) -> Comparison:
        predictions = trained.predictions()
        assert predictions is not None
        head = self.solving.logits_without(plan.train, predictions.samples)
        ensemble = self.plan.config.freezing.ensemble
        found = compare(head, predictions)
        if ensemble:
            self._average(head, plan)
            found = replace(found, answer="ensemble")
        elif found.answer == "trained":
            self.run.adopt(trained)
        self.run.save_comparison(found)
        return found

    def _average(self, head: Tensor, plan: Plan) -> None:
        """The run is the ensemble from now on, scored with a head that has not seen val."""
        loading, member = plan.loading, Run(self.run.path / _MEMBER)
        inference = Inference(batch_size=loading.batch_size, workers=loading.workers)
        raw = predict(plan.classifier, plan.val, inference, "val")
        temperature = calibrate(raw.logits, raw.labels).temperature
        predictions, _ = calibrated(raw, temperature)
        member.path.mkdir(parents=True, exist_ok=True)
        member.save_classifier(replace(plan.classifier, temperature=temperature))
        run, metrics, has_val = self.run, self.run.metrics(), len(self.plan.val) > 0
        logits = mean_probability([head, predictions.logits], [1 - _WEIGHT, _WEIGHT])
        found = self.solving.found
        assert found is not None
        run.save_classifier(replace(found.classifier, members=(Member(_MEMBER, _WEIGHT),)))
        mean = replace(predictions, logits=logits)
        if not has_val:
            mean = replace(mean, role="out-of-fold", folds=(0,) * len(mean.samples))
        run.save_predictions(mean)
        run.save_metrics(
            replace(
                metrics,
                model=f"the mean of {metrics.model} and of a network that was trained",
                val=mean.score(),
                evidence=Evidence.SELECTED if has_val else Evidence.OUT_OF_FOLD,
                calibration=None,
            )
        )


def compare(head: Tensor, trained: Predictions) -> Comparison:
    """`head` (N, C): calibrated logits of the same images."""
    labels = trained.labels
    losses = [cross_entropy(of.double(), labels, reduction="none") for of in (head, trained.logits)]
    difference = losses[0] - losses[1]
    error = float(difference.std() / math.sqrt(len(labels))) if len(labels) > 1 else math.inf
    better = float(difference.mean()) > _STANDARD_ERRORS * error
    return Comparison(
        n=len(labels),
        head_loss=float(losses[0].mean()),
        trained_loss=float(losses[1].mean()),
        difference=float(difference.mean()),
        standard_error=error,
        answer="trained" if better else "head",
    )
