"""Settings of a plan, as far as they can be settled before any data is read."""

import logging
import os
from pathlib import Path

import torch

from cnnft.cache import store
from cnnft.config.choices import Mode
from cnnft.config.schema import Config
from cnnft.config.solving import against_auto
from cnnft.data.sources import require_source
from cnnft.errors import UsageError, listed
from cnnft.inference.storage import require_model
from cnnft.machine.devices import choose_precision
from cnnft.models.registry import local_folder, resolve
from cnnft.training.optim import require_optimizer
from cnnft.training.tensorboard import require_tensorboard

_log = logging.getLogger(__name__)


def check_settings(config: Config, device: torch.device) -> Config:
    """What can be refused before the data is read; with absolute paths, and the precision."""
    if config.machine.sync_bn and device.type != "cuda":
        raise UsageError(
            f"--sync-bn is for several GPUs, and this trains on {device}: leave it out"
        )
    for teacher in config.loss.teacher:
        require_model(teacher)
    resolve(config.network.backbone, own_weights=config.network.weights is not None)
    if config.machine.cache in ("auto", "disk"):
        store.limit()
    require_optimizer(config.optim)
    if config.run.tensorboard:
        require_tensorboard()
    require_source(config.dataset.data)
    precision = choose_precision(config.machine.precision, device)
    config = _with_absolute_paths(config).replace(precision=precision)
    _require_no_source_replaced(config)
    return config


def settle_mode(config: Config) -> Config:
    """In mode auto the head comes first, unless other settings say what trains or how.

    Raises:
        UsageError: --ensemble, and there will not be two networks.
    """
    freezing, flags = config.freezing, against_auto(config)
    if freezing.ensemble and (freezing.mode != "auto" or flags):
        other = f"--mode {freezing.mode}" if freezing.mode != "auto" else listed(flags, 3)
        raise UsageError(f"--ensemble is of what --mode auto trains: leave out {other}")
    if freezing.mode != "auto":
        return config
    frozen = not flags or freezing.feature_views is not None or freezing.head_solver == "sgd"
    mode: Mode = "feature-extractor" if frozen else "finetune"
    if flags:
        _log.info("--mode %s, because of %s", mode, listed(flags, 3))
    return config.replace(mode=mode)


def run_name(config: Config) -> str:
    if config.run.name is not None:
        return config.run.name
    backbone = config.network.backbone.removeprefix("local-dir:").rstrip("/")
    return f"{Path(config.dataset.data).name}-{Path(backbone).name}"


def _require_no_source_replaced(config: Config) -> None:
    """Raises `UsageError` where --force would replace what the run is to learn from."""
    if not config.run.force:
        return
    replaced = Path(config.run.runs_dir, run_name(config)).resolve()
    backbone, weights = local_folder(config.network.backbone), config.network.weights
    sources = [("teacher", path) for path in config.loss.teacher]
    sources += [("backbone", str(backbone))] if backbone else []
    sources += [("weights", str(weights))] if weights else []
    for what, path in sources:
        if Path(path).resolve().is_relative_to(replaced):
            raise UsageError(
                f"--force would replace {replaced}, which holds the {what} {path}: choose "
                "another --name"
            )


def _with_absolute_paths(config: Config) -> Config:
    """So that the run can be read from another working directory."""
    # Not Path.resolve: a run is named after the link that the user gave, not after its target.
    data = Path(os.path.abspath(config.dataset.data))  # noqa: PTH100
    weights = None if config.network.weights is None else Path(config.network.weights).absolute()
    backbone = config.network.backbone
    folder = local_folder(backbone) if backbone != "builtin" else None
    return config.replace(
        data=data,
        weights=weights,
        backbone=f"local-dir:{folder.absolute()}" if folder else backbone,
        teacher=tuple(str(Path(teacher).absolute()) for teacher in config.loss.teacher),
    )
