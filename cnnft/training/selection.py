"""Which weights become the run's model: the best epoch, or an average or vote that is as good."""

from collections.abc import Sequence
from typing import Any

from cnnft.metrics import Score
from cnnft.runs.run import Epoch
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


def metrics_of(plan: Plan, best: Epoch) -> dict[str, Any]:
    """What metrics.json says of the best epoch."""
    return {
        "model": f"best epoch {best.epoch}",
        "best_epoch": best.epoch,
        "train": {"n": len(plan.train), "loss": best.train_loss, "accuracy": best.train_accuracy},
        "val": val_metrics(score_of(plan, best)),
    }


def val_metrics(val: Score, selected: bool = True) -> dict[str, Any]:
    note = "selected on val, as the best of several, so optimistic"
    return {
        "note": note if selected else "not selected on val",
        "n": val.n,
        "correct": val.correct,
        "accuracy": val.accuracy,
        "interval95": val.interval,
        "macro_recall": val.macro_recall,
        "loss": val.loss,
    }
