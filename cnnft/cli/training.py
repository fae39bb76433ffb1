"""Progress of a training, and how it stops at a signal."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cnnft.cli import console
from cnnft.errors import CnnftError
from cnnft.machine import distributed

if TYPE_CHECKING:
    from cnnft.config.schema import Config
    from cnnft.runs.records import Epoch
    from cnnft.runs.run import Run
    from cnnft.training.events import Event, Finished
    from cnnft.training.plan import Plan


class InterruptedRunError(CnnftError):
    """Training stopped at a signal; nothing is lost."""

    def __init__(self, number: int, run: Path, step: int) -> None:
        super().__init__(
            f"interrupted after step {step}; go on with: cnnft finetune --resume {run}"
        )
        self.exit_code = 128 + number


def train(plan: "Plan", run: "Run | None") -> "Finished":
    """Run the plan, resuming `run` if there is one, and show progress.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM came, and the state was saved.
    """
    from cnnft.cache.pixels import CacheProgress
    from cnnft.runs.records import Epoch
    from cnnft.training.events import Started, Stopped
    from cnnft.training.finetune import run_plan
    from cnnft.training.step import StepDone

    macro = "   macro" if plan.config.balanced else ""
    console.say(f" epoch   train loss     acc    val loss     acc{macro}      gap", style="bold")
    columns = ("loss {task.fields[loss]}", "{task.fields[speed]} images/s")
    with _signals() as received, console.progress(*columns) as bar:
        task = bar.add_task("training", total=len(plan.batches), loss="-", speed="-")
        drawn, images = time.monotonic(), 0
        for event in _with_advice(run_plan(plan, run, stop=lambda: bool(received))):
            if isinstance(event, StepDone):
                images += event.images
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
            elif isinstance(event, CacheProgress):
                bar.update(task, description=f"{event.doing} image {event.images} of {event.total}")
            elif isinstance(event, Started):
                kept = event.run.environment() or {}
                console.log_to(event.run.log, ", ".join(" ".join(item) for item in kept.items()))
            elif isinstance(event, Stopped):
                number = received[0] if received else signal.SIGTERM  # it reached another process
                interrupted = InterruptedRunError(number, event.run.path, event.step)
                if not distributed.is_main:  # which says so
                    sys.exit(interrupted.exit_code)
                raise interrupted
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
    except Exception:
        if run is not None and run.has_checkpoint():
            console.say(f"what was reached is kept; go on with: cnnft finetune --resume {run.path}")
        raise


def _epoch_line(epoch: "Epoch", config: "Config") -> str:
    macro = f" {epoch.val_macro_recall:7.1%}" if config.balanced else ""
    return (
        f"{epoch.epoch:>3}/{config.training.epochs:<3} "
        f"{epoch.train_loss:10.4f} {epoch.train_accuracy:7.1%} "
        f"{epoch.val_loss:11.4f} {epoch.val_accuracy:7.1%}{macro} {100 * epoch.gap:+8.1f}"
        f"{'  best so far' if epoch.best else ''}"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the signals received; the first of each kind is only recorded, a second one acts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])
        console.say("stopping after this step; once more to leave at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
