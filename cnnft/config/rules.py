"""What settings say of each other: contradictions, each a sentence with the way out."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnnft.config.solving import about_steps, frozen, solves_head
from cnnft.config.texts import parse_interval, parse_statistics

if TYPE_CHECKING:
    from cnnft.config.schema import Config

_LONGEST_NAME = 200  # file systems take 255, and names count up


def contradictions(config: "Config") -> Iterator[str]:
    """Sentences about settings that cannot go together.

    Raises:
        UsageError: a text that stands for numbers has another form.
    """
    parse_interval(config.run.checkpoint_every)
    if config.input.normalize not in ("pretrained", "dataset"):
        parse_statistics(config.input.normalize)
    for rule in (
        _lengths,
        _freezing,
        _solving,
        _network,
        _images,
        _loss,
        _schedule,
        _averaging,
        _name,
    ):
        yield from rule(config)


def _lengths(config: "Config") -> Iterator[str]:
    epochs, swa = config.training.epochs, config.averaging.swa
    warmup = config.schedule.warmup_epochs
    if warmup >= epochs:
        yield (
            f"--warmup-epochs {warmup} is out of range: it must be at least 0, below "
            f"--epochs {epochs}"
        )
    if swa is not None and swa >= epochs:
        yield f"--swa {swa} is out of range: it must be below --epochs {epochs}"
    if swa is not None and epochs - swa < warmup:
        yield (
            f"--swa {swa} would begin inside the warmup, at a rate that has not risen yet: lower "
            f"it to {math.floor(epochs - warmup)} at most, or lower --warmup-epochs {warmup:g}"
        )


def _freezing(config: "Config") -> Iterator[str]:
    freezing, optim = config.freezing, config.optim
    if freezing.train_stages is not None and freezing.mode not in ("finetune", "auto"):
        yield "--train-stages goes with --mode finetune"
    if optim.layer_decay is not None and freezing.mode == "feature-extractor":
        yield "--layer-decay is about pretrained layers, which are frozen here"
    if config.network.drop_path and freezing.mode == "feature-extractor":
        yield "--drop-path is about pretrained layers, which are frozen here"
    if optim.lr is not None and freezing.mode == "feature-extractor":
        yield (
            "--lr sets the rate of the pretrained layers, which feature-extractor mode "
            "freezes: use --head-lr"
        )
    whole = freezing.mode in ("finetune", "bn-only") and freezing.train_stages is None
    if freezing.feature_views is not None and whole:
        yield "--feature-views is about frozen layers: add --mode feature-extractor"
    if freezing.feature_views is not None and config.augmentation.mixes:
        yield "--feature-views are cached, --mixup and --cutmix mix anew in every step: choose"


def _solving(config: "Config") -> Iterator[str]:
    freezing = config.freezing
    if freezing.head_solver == "lbfgs":
        if not frozen(config) and freezing.mode != "auto":
            yield "--head-solver lbfgs is for a frozen backbone: add --mode feature-extractor"
        if flags := about_steps(config):
            yield (
                f"--head-solver lbfgs takes no steps, which {' and '.join(flags)} is about: leave "
                "one or the other out"
            )
    if freezing.features == "stages" and not solves_head(config) and freezing.mode != "auto":
        flags = about_steps(config)
        if not frozen(config):
            way_out = "add --mode feature-extractor"
        else:
            way_out = f"leave out {flags[0] if flags else '--head-solver sgd'}"
        yield f"--features stages is for a solved head: {way_out}"


def _network(config: "Config") -> Iterator[str]:
    network, freezing = config.network, config.freezing
    if network.head == "mlp" and freezing.probe_first:
        yield "--probe-first fits a linear head: leave out --head mlp"
    if network.head == "mlp" and network.head_init == "zeros":
        yield "--head-init zeros: an MLP of zeros has no gradient; choose another initialisation"
    if freezing.batchnorm == "frozen" and not network.pretrained:
        yield "--batchnorm frozen: random weights have no statistics to keep"
    if network.weights is not None and not network.pretrained:
        yield "--weights and --no-pretrained contradict each other: leave one out"
    if network.weights is not None and network.backbone == "builtin":
        yield "--weights goes with a named backbone; builtin brings its own weights"


def _images(config: "Config") -> Iterator[str]:
    if config.input.decoder == "draft" and config.input.train_resolution == "full":
        yield "--decoder draft downscales JPEGs, train_resolution full does not: choose one"


def _loss(config: "Config") -> Iterator[str]:
    loss = config.loss
    if config.optim.decay_all and not config.optim.weight_decay:
        yield "--decay-all goes with --weight-decay: give both, or neither"
    if loss.class_weights == "balanced" and config.training.sampling == "balanced":
        yield "--class-weights and --sampling balanced are for the same imbalance: leave one out"
    given = {"--temperature": loss.temperature, "--distill-weight": loss.distill_weight}
    for flag, value in given.items():
        if value is not None and not loss.teacher:
            yield f"{flag} is about a teacher: give one with --teacher RUN"


def _schedule(config: "Config") -> Iterator[str]:
    """A schedule of which training would see nothing is a mistake."""
    schedule, epochs = config.schedule, config.training.epochs
    warmup, restart = schedule.warmup_epochs, schedule.restart_epochs
    restarts = schedule.schedule == "cosine-restarts"
    if restarts and restart is not None and restart >= epochs - warmup:
        yield (
            f"restart_epochs {restart:g}: training ends before the first restart; lower "
            "it, or take --schedule cosine"
        )
    milestones = schedule.milestone_epochs(epochs)
    first, last = milestones[0], milestones[-1]
    if schedule.schedule == "multistep" and not warmup < first <= last < epochs:
        yield (
            f"milestones {first:g} to {last:g}: each must come after the warmup, "
            f"--warmup-epochs {warmup:g}, and before the end, --epochs {epochs}"
        )
    if schedule.schedule == "one-cycle" and warmup:
        yield (
            "--warmup-epochs with --schedule one-cycle, which rises by itself: leave it out "
            "(cycle_rise in the config file says for how long)"
        )


def _averaging(config: "Config") -> Iterator[str]:
    averaging = config.averaging
    swa, snapshots = averaging.swa, averaging.snapshots
    flags = [f"--{name}" for name in averaging.requested]
    if len(flags) > 1:
        yield f"{' and '.join(flags)} each make a model of their own: choose one"
    if config.training.patience is not None and (swa or snapshots):
        yield f"--patience may end training before {' '.join(flags)}: leave one out"
    if snapshots is not None:
        yield from _snapshots(config, snapshots)


def _snapshots(config: "Config", snapshots: int) -> Iterator[str]:
    schedule, epochs = config.schedule, config.training.epochs
    if schedule.schedule != "cosine-restarts":
        yield (
            f"--snapshots are taken where the rate has fallen and rises again, and "
            f"--schedule {schedule.schedule} does not: add --schedule cosine-restarts"
        )
    if schedule.restart_epochs is not None or schedule.restart_multiplier not in (None, 1):
        yield "--snapshots share the epochs evenly: leave out restart_epochs and _multiplier"
    cycles = epochs - schedule.warmup_epochs
    if cycles % snapshots:
        more = -cycles % snapshots
        yield (
            f"--epochs {epochs} cannot be shared evenly by --snapshots {snapshots}: "
            f"take {epochs + more:g}"
        )


def _name(config: "Config") -> Iterator[str]:
    name = config.run.name
    if name is None:
        return
    if name in {"", ".", ".."} or Path(name).name != name:
        yield f"--name {name!r:.100} must be a plain folder name (see --runs-dir)"
    if len(name.encode()) > _LONGEST_NAME:
        yield f"--name {name[:20]}… is too long: {_LONGEST_NAME} bytes at most"
