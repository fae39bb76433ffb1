"""cnnft finetune DATA: from a folder of images to a trained run.

Most flags are fields of `Config`; `_FLAGS` says what `--help` shows of them.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional, Union, get_args, get_origin

import typer

from cnnft.cli import console, options
from cnnft.cli.plan import optimizer_words, plan_json, show_plan
from cnnft.cli.training import train
from cnnft.config import FEATURE_VIEWS, Config, Schedule, flag
from cnnft.errors import UsageError
from cnnft.recipes import RECIPES, expand

if TYPE_CHECKING:
    from cnnft.planning import Plan
    from cnnft.run import Run
    from cnnft.session import Finished

_MODEL, _TRAINING, _DATA, _RUN = "Model", "Training", "Data", "Run and machine"
_MUCH, _IMAGES = "How much to train", "How the network sees images"
_RANDOM, _GENERALISE = "What training does to images at random", "Against overfitting"
_MODELS = "Averages and teachers"


class _Flag(NamedTuple):
    panel: str
    help: str
    default: str | None = None
    """In words; None: the default itself."""
    metavar: str | None = None
    switch: bool = False
    """On or not given: there is no --no-..."""


_FLAGS = {
    "mode": _Flag(
        _MODEL,
        "Train everything, only a new head on the frozen backbone, that and the normalisation "
        "layers, or what suits the data.",
    ),
    "backbone": _Flag(
        _MODEL,
        "A timm name, torchvision/NAME, hf-hub:OWNER/NAME, local-dir:PATH, or builtin (needs no "
        "network).",
        metavar="NAME",
    ),
    "weights": _Flag(
        _MODEL, "Backbone weights, .safetensors or .pth.", "downloaded once", metavar="FILE"
    ),
    "pretrained": _Flag(_MODEL, "Start from pretrained or from random weights.", "pretrained"),
    "train_stages": _Flag(
        _MUCH, "Train the last N stages only (see cnnft backbones).", "all", metavar="N"
    ),
    "probe_first": _Flag(
        _MUCH, "Start from a head fitted on frozen features.", "where pretrained layers train"
    ),
    "batchnorm": _Flag(_MUCH, "Statistics of BatchNorm layers that train."),
    "layer_decay": _Flag(
        _MUCH, "Each stage learns at this times the rate of the next one.", "none"
    ),
    "head": _Flag(_MUCH, "Kind of the new head."),
    "head_init": _Flag(_MUCH, "How its weights are drawn."),
    "image_size": _Flag(_IMAGES, "Side in pixels of what the network sees.", "as pretrained"),
    "fit": _Flag(_IMAGES, "Images that are not square: crop, squash or pad them.", "as pretrained"),
    "normalize": _Flag(
        _IMAGES,
        "Mean and std: the pretraining's, the training images', or given per channel.",
        metavar="pretrained|dataset|MEAN/STD",
    ),
    "augment": _Flag(_RANDOM, "Crops, flips, colours (cnnft check --show-augment draws them)."),
    "hflip": _Flag(
        _RANDOM, "Mirror half of the images; not where b and d differ.", "as --augment has it"
    ),
    "erase": _Flag(
        _RANDOM,
        "Erase a rectangle in this share of the images.",
        "as --augment has it",
        metavar="P",
    ),
    "mixup": _Flag(_RANDOM, "Blend images and labels; 0.2 is usual.", "off", metavar="ALPHA"),
    "cutmix": _Flag(_RANDOM, "Put a part of one into another; 1 is usual.", "off", metavar="ALPHA"),
    "feature_views": _Flag(
        _MUCH,
        "Where layers are frozen: random views of each image, whose features are kept.",
        str(FEATURE_VIEWS),
        metavar="K",
    ),
    "epochs": _Flag(_TRAINING, "Passes over the data."),
    "batch_size": _Flag(_TRAINING, "Images per step; auto: as many as fit.", metavar="N|auto"),
    "micro_batch": _Flag(
        _TRAINING,
        "Images computed at once; gradients add up to the step's. Saves memory.",
        "all",
        metavar="N",
    ),
    "lr": _Flag(_TRAINING, "Learning rate of the pretrained layers.", "the 1/10 rule"),
    "head_lr": _Flag(_TRAINING, "Learning rate of the new head.", "the 1/10 rule"),
    "schedule": _Flag(
        _TRAINING, f"How the rates fall: {', '.join(get_args(Schedule))}.", metavar="NAME"
    ),
    "warmup_epochs": _Flag(
        _TRAINING, "The rates rise this long before the schedule begins.", "none", metavar="EPOCHS"
    ),
    "optimizer": _Flag(
        _TRAINING,
        "sgd, plain-sgd, nesterov, rmsprop, adagrad, adadelta, adam, adamw, adamax, nadam, or "
        "another of timm.optim.",
        f"{Config.optimizer}, momentum {Config.momentum}",
        metavar="NAME",
    ),
    "clip_grad": _Flag(
        _TRAINING, "Largest norm of all gradients together.", "none", metavar="NORM"
    ),
    "skip_nonfinite": _Flag(
        _TRAINING,
        "Leave out up to N steps whose loss is NaN or infinite, instead of stopping.",
        metavar="N",
    ),
    "seed": _Flag(_TRAINING, "Same seed, CPU and number of threads: same weights."),
    "weight_decay": _Flag(_GENERALISE, "Draw weights towards zero; not norms and biases."),
    "decay_all": _Flag(_GENERALISE, "Norms and biases decay too.", switch=True),
    "dropout": _Flag(_GENERALISE, "Share of features dropped before the head."),
    "drop_path": _Flag(_GENERALISE, "Stochastic depth: share of images that skip the last block."),
    "label_smoothing": _Flag(
        _GENERALISE, "Share of each label that all classes get alike; 0.1 is usual."
    ),
    "patience": _Flag(
        _GENERALISE, "Stop after N epochs without a better one.", "all epochs", metavar="N"
    ),
    "class_weights": _Flag(_DATA, "In the loss; balanced: all classes count alike."),
    "sampling": _Flag(_DATA, "balanced: all classes are drawn alike, with replacement."),
    "focal": _Flag(
        _DATA, "Focal loss: what is right already counts less; 2 is usual.", "off", metavar="GAMMA"
    ),
    "val_fraction": _Flag(_DATA, "Share held out where there is no val folder."),
    "split_seed": _Flag(_DATA, "Another such share, whatever --seed."),
    "strict": _Flag(
        _DATA,
        "Stop at a file that is no image, or a damaged one, instead of skipping it.",
        switch=True,
    ),
    "ema": _Flag(
        _MODELS, "Keep a running average of the weights; 0.99 is usual.", "off", metavar="DECAY"
    ),
    "swa": _Flag(
        _MODELS, "Average the weights of the last N epochs, at a constant rate.", "off", metavar="N"
    ),
    "snapshots": _Flag(
        _MODELS,
        "Keep N models, one for each of as many --schedule cosine-restarts; they vote.",
        "off",
        metavar="N",
    ),
    "recalibrate_bn": _Flag(
        _MODELS,
        "At the end compute BatchNorm statistics anew over the training images.",
        switch=True,
    ),
    "teacher": _Flag(
        _MODELS,
        "Learn from what it says too; may be given again.",
        "none",
        metavar="RUN|FILE",
    ),
    "temperature": _Flag(_MODELS, "How soft student and teachers are compared.", "4"),
    "distill_weight": _Flag(_MODELS, "Share of the loss that is the teachers'.", "0.5"),
    "name": _Flag(_RUN, "Name of the run; counts up when taken.", "<data>-<backbone>"),
    "runs_dir": _Flag(_RUN, "Where runs are kept."),
    "force": _Flag(_RUN, "Replace a run of the same name.", switch=True),
    "checkpoint_every": _Flag(
        _RUN,
        "Keep the state to resume from, besides after each epoch: 90s, 5m, 2h, or steps.",
        metavar="TIME|STEPS",
    ),
    "tensorboard": _Flag(_RUN, "Write the history for TensorBoard too.", switch=True),
    "cache": _Flag(
        _RUN,
        "Where decoded images are kept for the next epoch; disk: for the next run too (see cnnft "
        "cache). Changes no result.",
    ),
    "decoder": _Flag(
        _RUN, "draft: read large JPEGs at a fraction of their size; faster, and other pixels."
    ),
    "workers": _Flag(_RUN, "Processes that load images.", "half of the processors, at most 8"),
    "device": _Flag(_RUN, "Where to compute.", metavar="auto|cpu|cuda|mps"),
    "precision": _Flag(
        _RUN,
        "Of what training computes: 16 bits are faster where the device has units for them.",
        "auto: 16 bits on CUDA, float32 elsewhere",
    ),
    "compile": _Flag(
        _RUN, "Compile the network first, for faster steps in a long training.", switch=True
    ),
    "sync_bn": _Flag(
        _RUN, "With several GPUs: BatchNorm sees the whole step's images.", switch=True
    ),
}
"""In the order of --help."""


def _parameter(name: str, shown: _Flag) -> inspect.Parameter:
    """None, "not given", lets a config file supply the setting."""
    field = next(field for field in dataclasses.fields(Config) if field.name == name)
    option = typer.Option(
        *([flag(name)] if shown.switch else []),
        rich_help_panel=shown.panel,
        show_default=False if shown.switch else shown.default or str(field.default),
        help=shown.help,
        metavar=shown.metavar,
        callback=options.batch_size if name == "batch_size" else None,
    )
    kind: Any = Annotated[Optional[_typed(field.type)], option]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _typed(annotation: Any) -> Any:
    """What the command line takes for a field; where that may be of several types, a text."""
    if get_origin(annotation) is tuple:
        return list[str]
    union = get_origin(annotation) in (Union, UnionType)
    kinds = set(get_args(annotation) if union else [annotation]) - {type(None)}
    return kinds.pop() if len(kinds) == 1 else str


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose `**settings` are the flags of `_FLAGS`."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    first = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    flags = [_parameter(name, shown) for name, shown in _FLAGS.items()]
    parameters = [*first, *flags, *(p for p in own if p not in first)]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@_with_flags
def command(
    data: Annotated[
        str | None,
        typer.Argument(
            help="Image folder: DATA/train/<class>/ and DATA/val/<class>/, or DATA/<class>/.",
            show_default=False,
        ),
    ] = None,
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_MODEL,
            help=f"Settings that go together: {', '.join(RECIPES)} (see cnnft recipes).",
            show_default="none",
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
    **settings: Any,
) -> None:
    """Train a classifier on a folder of images."""
    values = {"data": data, "recipe": recipe, **settings}
    given = {name: value for name, value in values.items() if value not in (None, [])}
    if resume is not None and (config is not None or "force" in given):
        raise UsageError("--resume goes on with a run as it is: leave out --config and --force")
    if recipe is not None and (resume is not None or config is not None):
        raise UsageError(
            "--recipe is for a new run: leave it out, or write it into the file of --config"
        )
    if plot_schedule is not None:
        from cnnft.plotting import require_plot

        require_plot(plot_schedule)
    run, chosen = _started(given, config) if resume is None else _resumed(given, resume)

    from cnnft.planning import prepare

    with console.progress() as bar:
        restored = run is not None and run.has_checkpoint()
        plan = prepare(chosen, restored=restored, on_files=console.reading_images(bar))
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


def _settings(given: dict[str, Any], config_file: str | None) -> Config:
    """The config file's settings, overridden by the flags that were given."""
    if config_file is None:
        if "data" not in given:
            raise UsageError("give the folder of images: cnnft finetune DATA (see --help)")
        return Config(**expand(given))
    from cnnft.run import read_config_file

    return Config.from_dict(expand(read_config_file(config_file) | given), config_file)


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
    free = {"epochs", "patience", "workers", "device", "micro_batch", "checkpoint_every"}
    free |= {"skip_nonfinite", "cache", "precision"}
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
    if config.epochs > before.epochs and (config.swa or config.snapshots or config.recalibrate_bn):
        raise UsageError(
            f"--epochs cannot be more than the {before.epochs} of {path}: its --swa, --snapshots "
            "or --recalibrate-bn is about their end; start a new run"
        )
    if config.epochs < before.epochs:
        raise UsageError(f"--epochs {config.epochs} is less than the {before.epochs} of {path}")
    return run, config


def _same(given: Any, before: Any) -> bool:
    return given == before or os.path.abspath(str(given)) == str(before)  # noqa: PTH100


def _show_end(plan: "Plan", finished: "Finished") -> None:
    low, high = finished.val.interval
    chance = max(plan.val.counts()) / len(plan.val)
    selected = "selected" if finished.selected else "not selected"
    console.say(
        f"\n{finished.model}: val accuracy {finished.val.accuracy:.1%} "
        f"(95% interval {low:.1%} to {high:.1%}, n = {finished.val.n}, {selected} on val; "
        f"always the commonest class: {chance:.1%}), macro recall {finished.val.macro_recall:.1%}",
        style="bold",
    )
    console.say(f"try it: cnnft predict IMAGES -m {finished.run.path}")
