"""Pictures of a plan, where matplotlib is installed."""

import importlib.util
from io import BytesIO
from pathlib import Path

from cnnft.config.optimization import ScheduleConfig
from cnnft.errors import CnnftError, UsageError
from cnnft.machine.files import write_whole
from cnnft.training.optim import LearningRates
from cnnft.training.schedules import Length, make_schedule

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


def plot_schedule(
    config: ScheduleConfig, rates: LearningRates, length: Length, title: str, path: Path
) -> None:
    """Draw the learning rates of the head and of the backbone's last stage over the epochs.

    Each has an axis of its own, since the rates are far apart and the shape is what one looks for.
    Of plateau it shows what comes while the loss on val falls.

    Raises:
        CnnftError: the file cannot be written.
    """
    # Not pyplot: it looks for a screen, and keeps every picture.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    total, steps_per_epoch = length.steps, length.steps_per_epoch
    steps = range(0, total, -(-total // _MOST_POINTS))
    edges = [step / steps_per_epoch for step in [*steps, total]]  # a rate holds for its whole step
    multiplier = make_schedule(config, length)
    drawn = {
        name: rate for name, rate in (("head", rates.head), ("backbone", rates.backbone)) if rate
    }
    figure = Figure(figsize=(7, 1 + 2 * len(drawn)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rows = figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0]
    for axes, (name, rate) in zip(rows, drawn.items(), strict=True):
        heights = [rate * multiplier(step) for step in steps]
        axes.stairs(heights, edges, fill=True, color=_COLOURS[name], alpha=0.12)
        axes.stairs(heights, edges, baseline=None, color=_COLOURS[name], linewidth=1.8)
        axes.set_title(f"{name}: up to {max(heights):.3g}", loc="left", fontsize=10)
        axes.set(ylim=(0, 1.08 * rate), xlim=(0, length.epochs), ylabel="learning rate")
        axes.set_axisbelow(True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("epoch")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    content = BytesIO()
    with rc_context({"svg.hashsalt": "cnnft"}):  # the same plan, the same bytes
        undated = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=undated)
    write_whole(path, content.getvalue())
