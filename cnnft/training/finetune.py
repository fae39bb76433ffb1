"""finetune: a plan -> train, or solve -> save. Reads top to bottom."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cnnft.config.recipes import expand
from cnnft.config.schema import Config
from cnnft.errors import CnnftError, listed
from cnnft.machine import distributed
from cnnft.machine.environment import environment
from cnnft.runs.run import Run
from cnnft.training.auto import Auto
from cnnft.training.events import Event, Finished, Started
from cnnft.training.feed import Feed
from cnnft.training.plan import Plan, prepare
from cnnft.training.session import DivergedError, Session
from cnnft.training.settings import run_name
from cnnft.training.solved import Solving
from cnnft.training.state import NonFiniteLossError
from cnnft.training.tensorboard import Board

_log = logging.getLogger(__name__)


_FILES_SHOWN = 3


def run_plan(
    plan: Plan, run: Run | None = None, *, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train as planned, or solve the head; yields at the start, after every step and validated
    epoch, at the end.

    Before the first step it may yield `CacheProgress` images: decoded, for all epochs to read.

    The state is saved after every epoch, at every `checkpoint_every`, and when `stop()` says so
    after a step. With `run` the training goes on from `plan.checkpoint`, and ends with the
    weights that it would have had without the interruption, bit for bit on the same device.
    Several processes each call it; the main one writes.

    Raises:
        CnnftError: the loss is not finite; a file cannot be read any more, or none be written.
    """
    name = run_name(plan.config)
    solves = plan.head_from == "solver"
    if run is None and not solves:  # before there is one
        Feed(plan).require_room()
    with run.locked() if run else Run.create(plan.asked, name) as run:
        run.save_config(plan.asked)
        run.save_data(plan.train, plan.val, plan.dataset.skipped)
        run.save_environment(environment(plan.device))
        yield Started(run)
        if plan.compares:
            yield from Auto(plan, run, run_plan).events(stop)
            return
        if solves:
            yield from Solving(plan, run).events(stop)
            return
        folder = run.tensorboard if plan.config.run.tensorboard and distributed.is_main else None
        with closing(Board(folder)) as board, _explained(plan):
            yield from Session(plan, run, board).events(stop)


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Errors that stop training name their images and the likely cause."""
    try:
        yield
    except NonFiniteLossError as error:
        if error.step == 0:
            cause = "at the first step the weights, or --normalize, are to blame"
        else:
            cause = "most often a learning rate is too high: lower --lr or --head-lr"
        files = [plan.train.paths[index] for index in plan.batches.at(error.step)]
        _log.debug("images of step %d: %s", error.step + 1, ", ".join(files))
        raise DivergedError(
            f"{error}: {cause}; its images: {listed(files, _FILES_SHOWN)} (with --skip-nonfinite "
            "N, also beside --resume, up to N such steps are left out)"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CnnftError(
            "BatchNorm cannot train on a single image of this size: raise --batch-size or "
            "--image-size, use fewer processes, or --batchnorm frozen"
        ) from error


def finetune(data: str | Path, *, recipe: str | None = None, **settings: Any) -> Run:
    """Train a classifier on a folder of images, as the command of the same name does.

        run = finetune("photos", recipe="fast", backbone="builtin")

    For progress, iterate over `run_plan(prepare(config))` instead.

    Args:
        recipe: one of `cnnft.recipes.RECIPES`.
        settings: fields of `Config`, which win over the recipe.

    Raises:
        CnnftError: what has to be mended, in a sentence.
    """
    named = {} if recipe is None else {"recipe": recipe}
    values = expand({"data": data, **named, **settings})
    for event in run_plan(prepare(Config.from_dict(values, "finetune"))):
        finished = event
    assert isinstance(finished, Finished)
    return finished.run
