"""cnnft finetune DATA: from a folder of images to a trained run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.cli.plan import optimizer_words, plan_json, show_plan
from cnnft.cli.settings import with_flags
from cnnft.cli.training import train
from cnnft.config.panels import MAIN, RUN
from cnnft.config.recipes import RECIPES, expand
from cnnft.config.schema import Config
from cnnft.errors import UsageError

if TYPE_CHECKING:
    from cnnft.runs.run import Run
    from cnnft.training.events import Finished


@with_flags
def command(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Image folder: DATA/train/CLASS and DATA/val/CLASS, or DATA/CLASS (see --layout).",
            show_default=False,
        ),
    ] = None,
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MAIN,
            help=f"Preset of settings: {', '.join(RECIPES)} (see cnnft recipes).",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RUN,
            help="Configuration file (TOML), such as RUN/config.toml; flags override it.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            rich_help_panel=MAIN,
            help="Resume an interrupted run; --epochs may be more than before. DATA, if its "
            "images were moved, says where they are now.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=RUN,
            help="Stop after the summary.",
        ),
    ] = False,
    plot_schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RUN,
            help="Plot the learning rates over the epochs, as .png or .svg.",
        ),
    ] = None,
    json: options.MainJson = False,
    quiet: options.MainQuiet = False,
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
        from cnnft.training.plots import require_plot

        require_plot(plot_schedule)
    run, chosen = _started(given, config) if resume is None else _resumed(given, resume)

    from cnnft.machine.devices import choose_device, keep_freed_memory
    from cnnft.training.plan import prepare

    if choose_device(chosen.machine.device).type == "cpu":
        keep_freed_memory()
    with console.progress() as bar:
        plan = prepare(chosen, run, on_files=console.reading_images(bar))
    show_plan(plan)
    if plot_schedule is not None:
        from cnnft.training.plots import plot_schedule as draw

        words = optimizer_words(plan.config)
        draw(plan.config.schedule, plan.rates, plan.length, words, plot_schedule)
    if dry_run:
        if json:
            console.result_json(plan_json(plan))
        return
    finished = train(plan, run)
    _show_end(finished)
    if json:
        console.result_json({"run": str(finished.run.path), **finished.run.metrics().to_dict()})
    else:
        console.result(str(finished.run.path))


def _settings(given: dict[str, Any], config_file: str | None) -> Config:
    """The config file's settings, overridden by the flags that were given."""
    if config_file is None:
        if "data" not in given:
            raise UsageError("give the folder of images: cnnft finetune DATA (see --help)")
        return Config.of(**expand(given))
    from cnnft.config.file import read_config_file

    return Config.from_dict(expand(read_config_file(config_file) | given), config_file)


def _started(given: dict[str, Any], config_file: str | None) -> tuple["Run | None", Config]:
    """The settings, and the run that torchrun's processes began before they were started again."""
    settings = _settings(given, config_file)

    from cnnft.runs.run import Run

    run = Run.of_this_launch(settings.run.runs_dir)
    return run, settings if run is None else run.config()


def _resumed(given: dict[str, Any], path: str) -> tuple["Run", Config]:
    from cnnft.runs.run import Run
    from cnnft.training.resume import resumed_config

    run = Run.open(path)
    return run, resumed_config(run, given)


def _show_end(finished: "Finished") -> None:
    metrics, val = finished.metrics, finished.metrics.val
    predictions = finished.run.predictions()
    assert predictions is not None
    low, high = val.interval
    chance = max(predictions.samples.counts()) / val.n
    what = "val accuracy" if predictions.role == "val" else "accuracy"
    console.say(
        f"\n{metrics.model}: {what} {val.accuracy:.1%} "
        f"(95% interval {low:.1%} to {high:.1%}, n = {val.n}, {metrics.evidence}; "
        f"majority-class baseline {chance:.1%}), balanced accuracy {val.macro_recall:.1%}",
        style="bold",
    )
    if found := metrics.calibration:
        console.say(
            f"temperature {found.temperature:.2f}: log-loss {found.loss_before:.3f} → "
            f"{val.loss:.3f}, expected calibration error {found.ece_before:.1%} → {found.ece:.1%}"
        )
    if finished.run.description().stages:
        console.say(
            "its head reads several stages, which timm and torchvision have no place for: for them "
            "take --features last"
        )
    console.say(f"try it: cnnft predict IMAGES -m {finished.run.path}")
