"""Progress of a training, and how it stops at a signal."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnnft.cli import console
from cnnft.cli.plan import show_advised, show_comparison
from cnnft.errors import CnnftError
from cnnft.machine import distributed, interruption

if TYPE_CHECKING:
    from cnnft.config.schema import Config
    from cnnft.runs.records import Epoch
    from cnnft.runs.run import Run
    from cnnft.training.events import Event, Finished, StartScored
    from cnnft.training.plan import Plan


_FORECAST_STEPS = 5
_LONG = 120.0
"""Seconds of training that are said before."""


class InterruptedRunError(CnnftError):
    """Training stopped at a signal; nothing is lost."""

    def __init__(self, number: int, run: Path, step: int | None = None) -> None:
        reached = "" if step is None else f" after step {step}"
        super().__init__(f"interrupted{reached}; go on with: cnnft finetune --resume {run}")
        self.exit_code = 128 + number


class Forecast:
    """Says once, after the first steps, how long training will take, where that is long."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._over = False

    def step(self, step: int, total: int) -> None:
        """A step was taken, of `total`."""
        now = time.monotonic()
        if self._first is None:  # it may have waited for much that later ones do not
            self._first = step, now
        first, begun = self._first
        if self._over or step - first < _FORECAST_STEPS:
            return
        self._over = True
        left = (now - begun) / (step - first) * (total - step)
        if left >= _LONG:
            console.say(
                f"training takes about {left / 60:.0f} minutes more; a head alone takes about as "
                "long as one epoch: --mode feature-extractor"
            )


def train(plan: "Plan", run: "Run | None") -> "Finished":
    """Run the plan, resuming `run` if there is one, and show progress.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM came, and the state was saved.
    """
    from cnnft.cache.pixels import CacheProgress
    from cnnft.runs.records import Epoch
    from cnnft.runs.scores import Comparison
    from cnnft.training.events import Advised, Started, StartScored, Stopped, Trying
    from cnnft.training.finetune import run_plan
    from cnnft.training.step import StepDone

    if plan.head_from != "solver":
        _say_header(plan.config)
    columns = ("loss {task.fields[loss]}", "{task.fields[speed]} images/s")
    with interruption.deferred() as interrupted, console.progress(*columns) as bar:
        task = bar.add_task("training", total=len(plan.batches), loss="-", speed="-")
        drawn, images, forecast = time.monotonic(), 0, Forecast()
        for event in _with_advice(run_plan(plan, run, stop=interrupted)):
            if isinstance(event, StepDone):
                images += event.images
                forecast.step(event.step, len(plan.batches))
                elapsed = time.monotonic() - drawn
                if elapsed > 0.2 and not bar.disable:  # reading the loss waits for the device
                    speed, loss = f"{images / elapsed:.0f}", f"{event.loss.item():.3f}"
                    bar.update(
                        task, completed=event.step, loss=loss, speed=speed, description="training"
                    )
                    drawn, images = time.monotonic(), 0
                if event.step % plan.batches.steps_per_epoch == 0:  # the next event is its Epoch
                    # now, and not with the next regular drawing: it may be over before that
                    bar.update(task, completed=event.step, description="validating", refresh=True)
            elif isinstance(event, Epoch):
                bar.update(task, description="training")
                console.say(_epoch_line(event, plan.config))
            elif isinstance(event, Advised):
                show_advised(event)
            elif isinstance(event, Trying):
                plan = event.plan
                bar.update(task, total=len(plan.batches), completed=0)
                _say_header(plan.config)
            elif isinstance(event, Comparison):
                show_comparison(event)
            elif isinstance(event, StartScored):
                console.say(_start_line(event, plan.config))
            elif isinstance(event, CacheProgress):
                bar.update(task, description=f"{event.doing} image {event.images} of {event.total}")
            elif isinstance(event, Started):
                kept = event.run.environment() or {}
                console.log_to(event.run.log, ", ".join(" ".join(item) for item in kept.items()))
            elif isinstance(event, Stopped):
                number = interruption.received() or signal.SIGTERM  # it reached another process
                error = InterruptedRunError(number, event.run.path, event.step)
                if not distributed.is_main:  # which says so
                    sys.exit(error.exit_code)
                raise error
            else:
                return event
    raise AssertionError("training ends with Finished")


def _with_advice(events: "Iterator[Event]") -> "Iterator[Event]":
    """`events`; where they end in an error, how to go on."""
    from cnnft.training.events import Started
    from cnnft.training.session import DivergedError

    run: Run | None = None
    try:
        for event in events:
            run = event.run if isinstance(event, Started) else run
            yield event
    except DivergedError:
        raise  # as it would again
    except interruption.Interrupted as error:
        if run is None:
            raise
        raise InterruptedRunError(error.number, run.path) from error
    except Exception:
        if run is not None and run.has_checkpoint():
            console.say(f"what was reached is kept; go on with: cnnft finetune --resume {run.path}")
        raise


def _say_header(config: "Config") -> None:
    macro = "   macro" if config.balanced else ""
    console.say(
        f" epoch   train loss     acc    val loss  calibrated     acc{macro}      gap", style="bold"
    )


def _start_line(event: "StartScored", config: "Config") -> str:
    val = event.val
    found = val.loss, event.calibrated_loss, val.accuracy, val.macro_recall
    return f"  start{'':20}{_val_columns(config, *found)}"


def _epoch_line(epoch: "Epoch", config: "Config") -> str:
    found = epoch.val_loss, epoch.val_calibrated_loss, epoch.val_accuracy, epoch.val_macro_recall
    return (
        f"{epoch.epoch:>3}/{config.training.epochs:<3} "
        f"{epoch.train_loss:10.4f} {epoch.train_accuracy:7.1%} "
        f"{_val_columns(config, *found)} {100 * epoch.gap:+8.1f}"
        f"{'  best so far' if epoch.best else ''}"
    )


def _val_columns(
    config: "Config", loss: float, calibrated: float, accuracy: float, macro: float
) -> str:
    """`calibrated`: the log-loss after temperature, which epochs are chosen by."""
    return f"{loss:11.4f} {calibrated:11.4f} {accuracy:7.1%}" + (
        f" {macro:7.1%}" if config.balanced else ""
    )
