"""Which weights become the run's model: the best epoch, an average or an ensemble."""

from collections.abc import Sequence

from cnnft.metrics import Score
from cnnft.runs.records import Epoch, Metrics, TrainScore
from cnnft.training.plan import Plan


def best_epoch(history: Sequence[Epoch]) -> Epoch | None:
    return next((epoch for epoch in reversed(history) if epoch.best), None)


def is_better(val: Score, other: Score, balanced: bool) -> bool:
    """A higher accuracy, or the same with a lower loss."""
    return (-selected_by(val, balanced), val.loss) < (-selected_by(other, balanced), other.loss)


def selected_by(val: Score, balanced: bool) -> float:
    """Accuracy, or where training weighs all classes equally balanced accuracy."""
    return val.macro_recall if balanced else val.accuracy


def score_of(plan: Plan, epoch: Epoch) -> Score:
    n = len(plan.val)
    return Score(n, round(epoch.val_accuracy * n), epoch.val_macro_recall, epoch.val_loss)


def metrics_of(plan: Plan, best: Epoch) -> Metrics:
    """The scores of the best epoch."""
    return Metrics(
        model=f"best epoch {best.epoch}",
        best_epoch=best.epoch,
        train=TrainScore(len(plan.train), best.train_loss, best.train_accuracy),
        val=score_of(plan, best),
    )
