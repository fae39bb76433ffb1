"""cnnft finetune DATA: from a folder of images to a trained run."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from cnnft.cli import console, options
from cnnft.cli.plan import optimizer_words, plan_json, show_plan
from cnnft.cli.training import train
from cnnft.config import Augment, BatchNorm, Config, Fit, Head, HeadInit, Mode, Schedule
from cnnft.errors import UsageError

if TYPE_CHECKING:
    from cnnft.planning import Plan
    from cnnft.recipe import Finished
    from cnnft.run import Run

_MODEL, _TRAINING, _DATA, _RUN = "Model", "Training", "Data", "Run and machine"
_MUCH, _IMAGES = "How much to train", "How the network sees images"
_RANDOM = "What training does to images at random"


def _option(panel: str, default: object, help: str, **more: Any) -> Any:
    # The parameter's own default is None, "not given", so that a config file can supply it.
    return typer.Option(rich_help_panel=panel, show_default=str(default), help=help, **more)


def _batch_size(value: str | None) -> int | str | None:
    if value in (None, "auto"):
        return value
    try:
        return int(value or "")
    except ValueError as error:
        raise UsageError(f"--batch-size {value!r}: give a whole number, or auto") from error


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
            "A timm name, torchvision/NAME, hf-hub:OWNER/NAME, local-dir:PATH, or builtin (needs "
            "no network).",
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
        _option(
            _MUCH, "where pretrained layers train", "Start from a head fitted on frozen features."
        ),
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
    augment: Annotated[
        Augment | None,
        _option(
            _RANDOM,
            Config.augment,
            "Crops, flips, colours (cnnft check --show-augment draws them).",
        ),
    ] = None,
    hflip: Annotated[
        bool | None,
        _option(
            _RANDOM, "as --augment has it", "Mirror half of the images; not where b and d differ."
        ),
    ] = None,
    erase: Annotated[
        float | None,
        _option(
            _RANDOM,
            "as --augment has it",
            "Erase a rectangle in this share of the images.",
            metavar="P",
        ),
    ] = None,
    mixup: Annotated[
        float | None,
        _option(_RANDOM, "off", "Blend images and labels; 0.2 is usual.", metavar="ALPHA"),
    ] = None,
    cutmix: Annotated[
        float | None,
        _option(_RANDOM, "off", "Put a part of one into another; 1 is usual.", metavar="ALPHA"),
    ] = None,
    epochs: Annotated[
        int | None, _option(_TRAINING, Config.epochs, "Passes over the data.")
    ] = None,
    batch_size: Annotated[
        str | None,
        _option(
            _TRAINING,
            Config.batch_size,
            "Images per step; auto: as many as fit.",
            metavar="N|auto",
            callback=_batch_size,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        _option(
            _TRAINING,
            "all",
            "Images computed at once; gradients add up to the step's. Saves memory.",
            metavar="N",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        _option(_TRAINING, "the 1/10 rule", "Learning rate of the pretrained layers."),
    ] = None,
    head_lr: Annotated[
        float | None,
        _option(_TRAINING, "the 1/10 rule", "Learning rate of the new head."),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        _option(
            _TRAINING,
            Config.schedule,
            "How the rates fall: " + ", ".join(get_args(Schedule)) + ".",
            metavar="NAME",
        ),
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        _option(
            _TRAINING,
            "none",
            "The rates rise this long before the schedule begins.",
            metavar="EPOCHS",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(
            _TRAINING,
            f"{Config.optimizer}, momentum {Config.momentum}",
            "sgd, plain-sgd, nesterov, rmsprop, adagrad, adadelta, adam, adamw, adamax, nadam, or "
            "another of timm.optim.",
            metavar="NAME",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        _option(_TRAINING, Config.weight_decay, "Draw weights towards zero; not norms and biases."),
    ] = None,
    decay_all: Annotated[
        bool | None,
        typer.Option(
            "--decay-all",
            rich_help_panel=_TRAINING,
            show_default=False,
            help="Norms and biases decay too.",
        ),
    ] = None,
    skip_nonfinite: Annotated[
        int | None,
        _option(
            _TRAINING,
            Config.skip_nonfinite,
            "Leave out up to N steps whose loss is NaN or infinite, instead of stopping.",
            metavar="N",
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
            help="Stop at a file that is no image, or a damaged one, instead of skipping it.",
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
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            rich_help_panel=_RUN,
            help="Go on with an interrupted run; --epochs may be more than before.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        _option(
            _RUN,
            Config.checkpoint_every,
            "Keep the state to resume from, besides after each epoch: 90s, 5m, 2h, or steps.",
            metavar="TIME|STEPS",
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
    sync_bn: Annotated[
        bool | None,
        typer.Option(
            "--sync-bn",
            rich_help_panel=_RUN,
            show_default=False,
            help="With several GPUs: BatchNorm sees the whole step's images.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=_RUN, help="Stop after the summary."),
    ] = False,
    plot_schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_RUN,
            help="Draw the learning rates over the epochs, .png or .svg.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier on a folder of images."""
    given = _given(context)
    if resume is not None and (config is not None or force):
        raise UsageError("--resume goes on with a run as it is: leave out --config and --force")
    if plot_schedule is not None:
        from cnnft.plotting import require_plot

        require_plot(plot_schedule)
    run, settings = _started(given, config) if resume is None else _resumed(given, resume)

    from cnnft.planning import prepare

    with console.progress() as bar:
        restored = run is not None and run.has_checkpoint()
        plan = prepare(settings, restored=restored, on_files=console.reading_images(bar))
    if run is not None:
        run.require_same_data(plan.train, plan.val)
    show_plan(plan)
    if plot_schedule is not None:
        from cnnft.plotting import plot_schedule as draw

        words, steps = optimizer_words(plan.config), plan.batches.steps_per_epoch
        draw(plan.config, plan.rates, steps, words, plot_schedule)
    if dry_run:
        if json:
            console.result_json(plan_json(plan))
        return
    finished = train(plan, run)
    _show_end(plan, finished)
    if json:
        console.result_json({"run": str(finished.run.path), **finished.run.metrics()})
    else:
        console.result(str(finished.run.path))


def _given(context: typer.Context) -> dict[str, Any]:
    """The settings that were given on the command line."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {
        key: value for key, value in context.params.items() if key in names and value is not None
    }


def _settings(given: dict[str, Any], config_file: str | None) -> Config:
    """The config file's settings, overridden by the flags that were given."""
    if config_file is None:
        if "data" not in given:
            raise UsageError("give the folder of images: cnnft finetune DATA (see --help)")
        return Config(**given)
    from cnnft.run import read_config_file

    return Config.from_dict(read_config_file(config_file) | given, config_file)


def _started(given: dict[str, Any], config_file: str | None) -> tuple["Run | None", Config]:
    """The settings, and the run that torchrun's processes began before they were started again."""
    settings = _settings(given, config_file)

    from cnnft.run import Run

    run = Run.of_this_launch(settings.runs_dir)
    return run, settings if run is None else run.config()


def _resumed(given: dict[str, Any], path: str) -> tuple["Run", Config]:
    """The run and its settings, with given ones that may change on the way."""
    from cnnft.run import Run

    run = Run.open(path)
    before = run.config()
    free = {"epochs", "workers", "device", "micro_batch", "checkpoint_every", "skip_nonfinite"}
    other = [
        key.replace("_", "-")
        for key, value in given.items()
        if key not in free and not _same(value, getattr(before, key))
    ]
    if other:
        raise UsageError(
            f"--resume {path} goes on with the settings of the run, which differ in "
            f"{', '.join(sorted(other))}: leave out, or start a new run"
        )
    config = dataclasses.replace(before, **{k: v for k, v in given.items() if k in free})
    if config.epochs < before.epochs:
        raise UsageError(f"--epochs {config.epochs} is less than the {before.epochs} of {path}")
    return run, config


def _same(given: Any, before: Any) -> bool:
    return given == before or os.path.abspath(str(given)) == str(before)  # noqa: PTH100


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
