"""cnnft finetune DATA: from a folder of images to a trained run."""

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.cli.plan import plan_json, show_plan
from cnnft.config import BatchNorm, Config, Fit, Head, HeadInit, Mode, Schedule
from cnnft.errors import UsageError

if TYPE_CHECKING:
    from cnnft.planning import Plan
    from cnnft.recipe import Finished
    from cnnft.run import Epoch

_MODEL, _TRAINING, _DATA, _RUN = "Model", "Training", "Data", "Run and machine"
_MUCH, _IMAGES = "How much to train", "How the network sees images"


def _option(panel: str, default: object, help: str, **more: Any) -> Any:
    # The parameter's own default is None, "not given", so that a config file can supply it.
    return typer.Option(rich_help_panel=panel, show_default=str(default), help=help, **more)


def command(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Image folder: DATA/train/<class>/ and DATA/val/<class>/, or DATA/<class>/.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Mode | None,
        _option(
            _MODEL,
            Config.mode,
            "Train everything, only a new head on the frozen backbone, that and the "
            "normalisation layers, or what suits the data.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        _option(
            _MODEL,
            Config.backbone,
            "A timm name, torchvision/NAME, local-dir:PATH, or builtin (needs no network).",
            metavar="NAME",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        _option(
            _MODEL,
            "downloaded once",
            "Backbone weights, .safetensors or .pth.",
            metavar="FILE",
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        _option(_MODEL, "pretrained", "Start from pretrained or from random weights."),
    ] = None,
    train_stages: Annotated[
        int | None,
        _option(_MUCH, "all", "Train the last N stages only (see cnnft backbones).", metavar="N"),
    ] = None,
    probe_first: Annotated[
        bool | None,
        _option(_MUCH, "probe first", "Fit the head on frozen features before training."),
    ] = None,
    batchnorm: Annotated[
        BatchNorm | None,
        _option(_MUCH, Config.batchnorm, "Statistics of BatchNorm layers that train."),
    ] = None,
    layer_decay: Annotated[
        float | None,
        _option(_MUCH, "none", "Each stage learns at this times the rate of the next one."),
    ] = None,
    head: Annotated[Head | None, _option(_MUCH, Config.head, "Kind of the new head.")] = None,
    head_init: Annotated[
        HeadInit | None, _option(_MUCH, Config.head_init, "How its weights are drawn.")
    ] = None,
    dropout: Annotated[
        float | None, _option(_MUCH, Config.dropout, "Share of features dropped before the head.")
    ] = None,
    image_size: Annotated[
        int | None,
        _option(_IMAGES, "as pretrained", "Side in pixels of what the network sees."),
    ] = None,
    fit: Annotated[
        Fit | None,
        _option(_IMAGES, "as pretrained", "Images that are not square: crop, squash or pad them."),
    ] = None,
    normalize: Annotated[
        str | None,
        _option(
            _IMAGES,
            Config.normalize,
            "Mean and std: the pretraining's, the training images', or given per channel.",
            metavar="pretrained|dataset|MEAN/STD",
        ),
    ] = None,
    epochs: Annotated[
        int | None, _option(_TRAINING, Config.epochs, "Passes over the data.")
    ] = None,
    batch_size: Annotated[
        int | None, _option(_TRAINING, Config.batch_size, "Images per step.")
    ] = None,
    lr: Annotated[
        float | None,
        _option(_TRAINING, "the 1/10 rule", "Learning rate of the pretrained layers."),
    ] = None,
    head_lr: Annotated[
        float | None,
        _option(_TRAINING, "0.1 × batch / 256", "Learning rate of the new head."),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        _option(
            _TRAINING,
            Config.schedule,
            f"How the rates fall: half a cosine, or × {Config.step_gamma} every "
            f"{Config.step_epochs} epochs.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        _option(_TRAINING, Config.seed, "Same seed, CPU and number of threads: same weights."),
    ] = None,
    val_fraction: Annotated[
        float | None,
        _option(_DATA, Config.val_fraction, "Share held out where there is no val folder."),
    ] = None,
    split_seed: Annotated[
        int | None, _option(_DATA, Config.split_seed, "Another such share, whatever --seed.")
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict",
            rich_help_panel=_DATA,
            show_default=False,
            help="Stop at an unreadable image instead of skipping it.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        _option(_RUN, "<data>-<backbone>", "Name of the run; counts up when taken."),
    ] = None,
    runs_dir: Annotated[str | None, _option(_RUN, Config.runs_dir, "Where runs are kept.")] = None,
    force: Annotated[
        bool | None,
        typer.Option(
            "--force",
            rich_help_panel=_RUN,
            show_default=False,
            help="Replace a run of the same name.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_RUN,
            help="Settings, such as RUN/config.toml; flags win.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _option(_RUN, "half of the processors, at most 8", "Processes that load images."),
    ] = None,
    device: Annotated[
        str | None,
        _option(_RUN, Config.device, "Where to compute.", metavar="auto|cpu|cuda|mps"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=_RUN, help="Stop after the summary."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier on a folder of images."""
    settings = _settings(context, config)

    from cnnft.planning import prepare
    from cnnft.recipe import Finished

    with console.progress() as bar:
        task = bar.add_task("checking the images", total=None)
        plan = prepare(settings, on_file=lambda total: bar.update(task, total=total, advance=1))
    show_plan(plan)
    if dry_run:
        if json:
            console.result_json(plan_json(plan))
        return
    finished = _train(plan)
    assert isinstance(finished, Finished)
    _show_end(plan, finished)
    if json:
        console.result_json({"run": str(finished.run.path), **finished.run.metrics()})
    else:
        console.result(str(finished.run.path))


def _settings(context: typer.Context, config_file: str | None) -> Config:
    """The config file's settings, overridden by the flags that were given."""
    names = {field.name for field in dataclasses.fields(Config)}
    given = {
        key: value for key, value in context.params.items() if key in names and value is not None
    }
    if config_file is None:
        if "data" not in given:
            raise UsageError("give the folder of images: cnnft finetune DATA (see --help)")
        return Config(**given)
    from cnnft.run import read_config_file

    return Config.from_dict(read_config_file(config_file) | given, config_file)


def _train(plan: "Plan") -> "Finished":
    from cnnft.recipe import Finished, carry_out
    from cnnft.run import Epoch
    from cnnft.training import StepDone

    epochs = plan.config.epochs
    console.say(" epoch   train loss     acc    val loss     acc      gap", style="bold")
    with console.progress("loss {task.fields[loss]}", "{task.fields[speed]} images/s") as bar:
        task = bar.add_task("training", total=len(plan.batches), loss="-", speed="-")
        drawn, images = time.monotonic(), 0
        for event in carry_out(plan):
            if isinstance(event, StepDone):
                images += event.images
                elapsed = time.monotonic() - drawn
                if elapsed > 0.2 and not bar.disable:  # reading the loss waits for the device
                    speed, loss = f"{images / elapsed:.0f}", f"{event.loss.item():.3f}"
                    bar.update(task, completed=event.step, loss=loss, speed=speed)
                    drawn, images = time.monotonic(), 0
            elif isinstance(event, Epoch):
                console.say(_epoch_line(event, epochs))
            else:
                assert isinstance(event, Finished)
                return event
    raise AssertionError("training ends with Finished")


def _epoch_line(epoch: "Epoch", epochs: int) -> str:
    return (
        f"{epoch.epoch:>3}/{epochs:<3} {epoch.train_loss:10.4f} {epoch.train_accuracy:7.1%} "
        f"{epoch.val_loss:11.4f} {epoch.val_accuracy:7.1%} {100 * epoch.gap:+8.1f}"
        f"{'  best so far' if epoch.best else ''}"
    )


def _show_end(plan: "Plan", finished: "Finished") -> None:
    low, high = finished.val.interval
    chance = max(plan.val.counts()) / len(plan.val)
    console.say(
        f"\nbest epoch {finished.best.epoch}: val accuracy {finished.val.accuracy:.1%} "
        f"(95% interval {low:.1%} to {high:.1%}, n = {finished.val.n}, selected on val; "
        f"always the commonest class: {chance:.1%})",
        style="bold",
    )
    console.say(f"try it: cnnft predict IMAGES -m {finished.run.path}")
