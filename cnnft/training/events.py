"""What a run yields while it trains: the caller draws progress, logs, or stops."""

from dataclasses import dataclass

from cnnft.cache.pixels import CacheProgress
from cnnft.metrics import Score
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.runs.scores import Comparison, Metrics
from cnnft.training.advice import Advice
from cnnft.training.plan import Plan
from cnnft.training.step import StepDone


@dataclass(frozen=True)
class Started:
    """The first event: the run's directory is there."""

    run: Run


@dataclass(frozen=True)
class StartScored:
    """Before the first step: the run holds the network whose head was fitted."""

    val: Score
    calibrated_loss: float


@dataclass(frozen=True)
class Advised:
    """What the head that was solved says of the data."""

    advice: Advice
    trains: bool
    """Whether a network is trained to compare with."""


@dataclass(frozen=True)
class Trying:
    """The events that follow are of this plan."""

    plan: Plan


@dataclass(frozen=True)
class Finished:
    """The last event: the run holds the model."""

    run: Run
    metrics: Metrics


@dataclass(frozen=True)
class Stopped:
    """The last event where the caller stopped training: a resumed run goes on after this step."""

    run: Run
    step: int | None
    """None: a head that is solved is solved again."""


Event = (
    Started
    | Advised
    | Trying
    | CacheProgress
    | StartScored
    | StepDone
    | Epoch
    | Comparison
    | Finished
    | Stopped
)
