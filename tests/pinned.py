"""Short trainings in float64 whose losses are kept in tests/losses/; `test_losses` compares them.

`python tests/pinned.py` writes the files anew: a commit that changes them says why.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from conftest import draw_folder
from safetensors.torch import save_file

from cnnft import Config
from cnnft.runs.records import Epoch
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone

LOSSES = Path(__file__).parent / "losses"
MODES = ("finetune", "feature-extractor")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # 16 training images in batches of 6: the last one of each epoch has 4.
    "schedule-step": {"schedule": "step", "step_epochs": 1, "batch_size": 6},
    "accumulation": {
        "batch_size": 6, "micro_batch": 4, "optimizer": "adamw", "weight_decay": 0.05,
        "clip_grad": 1.0, "head_lr": 0.01,
    },
    "mixup": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "batch_size": 4},
    "distillation": {"teacher": True, "temperature": 2.0, "batch_size": 6},
    "ema": {"ema": 0.9, "warmup_epochs": 1.0, "schedule": "cosine", "batch_size": 6},
    "imbalance": {
        "focal": 2.0, "class_weights": "balanced", "dropout": 0.2, "schedule": "one-cycle",
        "augment": "strong", "batch_size": 6,
    },
}  # fmt: skip


@contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def tiny_backbone(folder: Path) -> str:
    """A small ResNet whose weights are drawn in float64, which every CPU does alike."""
    arguments = {"channels": [8, 12, 16, 24], "stem_width": 8}
    config = {"input_size": [3, 32, 32], "crop_pct": 0.9, "num_classes": 0}
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    state = timm.create_model("resnet10t", num_classes=0, **arguments).state_dict()
    for name, tensor in state.items():
        if tensor.ndim > 1:
            scale = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(scale * draw(tensor.shape))
        elif name.endswith("running_mean"):
            tensor.copy_(0.1 * draw(tensor.shape))
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    described = {"architecture": "resnet10t", "model_args": arguments, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(described))
    return f"local-dir:{folder}"


def make_material(folder: Path) -> None:
    """In `folder`: data, a backbone, and a teacher that was trained on the data's classes."""
    draw_folder(folder / "data" / "train", ("ants", "bees"), 6)
    draw_folder(folder / "data" / "train", ("wasps",), 4)
    draw_folder(folder / "data" / "val", ("ants", "bees", "wasps"), 2, first_seed=100)
    tiny_backbone(folder / "backbone")
    run_losses(folder, {"name": "teacher", "head_lr": 0.1, "batch_size": 8}, "feature-extractor")


def run_losses(folder: Path, settings: dict[str, Any], mode: str) -> dict[str, list[float]]:
    """Train three epochs; the objective of every step, and the losses of every epoch."""
    if settings.get("teacher"):
        settings = settings | {"teacher": (str(folder / "runs" / "teacher"),)}
    config = Config.of(**{
        "data": folder / "data", "backbone": f"local-dir:{folder / 'backbone'}", "mode": mode,
        "runs_dir": folder / "runs", "epochs": 3, "workers": 0, "device": "cpu", "cache": "ram",
        "batchnorm": "train", "probe_first": False, **settings,
    })  # fmt: skip
    losses: dict[str, list[float]] = {"step": [], "objective": [], "train": [], "val": []}
    with in_float64():
        for event in run_plan(prepare(config)):
            if isinstance(event, StepDone):
                losses["step"].append(event.loss.item())
            elif isinstance(event, Epoch):
                losses["objective"].append(event.train_objective)
                losses["train"].append(event.train_loss)
                losses["val"].append(event.val_loss)
    return losses


def file_of(name: str, mode: str) -> Path:
    return LOSSES / f"{name}-{mode}.json"


def main() -> None:
    with TemporaryDirectory() as folder:
        make_material(Path(folder))
        for name, settings in CONFIGURATIONS.items():
            for mode in MODES:
                losses = run_losses(Path(folder), settings, mode)
                file_of(name, mode).write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
