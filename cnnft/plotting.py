"""Pictures of a plan, where matplotlib is installed."""

import importlib.util
from io import BytesIO
from pathlib import Path

from cnnft.config import Config
from cnnft.errors import CnnftError, UsageError
from cnnft.files import write_whole
from cnnft.optim import LearningRates
from cnnft.schedules import make_schedule

_MOST_POINTS = 4000  # more than a picture has pixels
_COLOURS = {"head": "#b4541a", "backbone": "#1f5f8b"}


def require_plot(path: Path) -> None:
    """What can be known before there is anything to draw.

    Raises:
        CnnftError: matplotlib is missing, or the name says no format.
    """
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot-schedule {path}: end the name in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise CnnftError("--plot-schedule needs the package matplotlib: pip install 'cnnft[plot]'")


def plot_schedule(config: Config, rates: LearningRates, steps_per_epoch: int, path: Path) -> None:
    """Draw the learning rate of each group at every step, over the epochs.

    Each has an axis of its own, since the rates are far apart and the shape is what one looks for.

    Raises:
        CnnftError: the file cannot be written.
    """
    # Not pyplot: it looks for a screen, and keeps every picture.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    total = config.epochs * steps_per_epoch
    steps = [*range(0, total, max(total // _MOST_POINTS, 1)), total - 1]
    multiplier = make_schedule(config, steps_per_epoch)
    groups = {"head": rates.head, "backbone": rates.backbone}
    groups = {name: rate for name, rate in groups.items() if rate}
    figure = Figure(figsize=(7, 1 + 2 * len(groups)), layout="constrained")
    for axes, (name, rate) in zip(
        figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0], groups.items(), strict=True
    ):
        # A rate holds for its whole step.
        ends = [step / steps_per_epoch for step in [*steps, total]]
        heights = [rate * multiplier(step) for step in steps]
        axes.stairs(heights, ends, baseline=None, color=_COLOURS[name], linewidth=1.8)
        axes.fill_between(
            ends,
            [*heights, heights[-1]],
            step="post",
            color=_COLOURS[name],
            alpha=0.12,
            linewidth=0,
        )
        axes.set_title(f"{name}: up to {max(heights):g}", loc="left", fontsize=10)
        axes.set(ylim=(0, 1.08 * rate), xlim=(0, config.epochs), ylabel="learning rate")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(_title(config), fontsize=12)
    content = BytesIO()
    with rc_context({"svg.hashsalt": "cnnft"}):  # the same plan, the same bytes
        undated = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=undated)
    write_whole(path, content.getvalue())


def _title(config: Config) -> str:
    title = f"{config.optimizer}, {config.schedule} schedule"
    if config.warmup_epochs:
        title += f", {config.warmup_epochs:g} epochs of warm-up"
    if config.schedule == "plateau":
        title += "\n(as long as the loss on val falls)"
    return title
