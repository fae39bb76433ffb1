"""Writes a run's averaged weights as the built-in backbone.

See `python -m research.pretrain.export --help`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from . import network
from .bank import BankSpec, load
from .train import CHECKPOINT
from .world import World


def averaged(checkpoint: Path, bank: Path) -> nn.Module:
    """The network with its averaged weights and BatchNorm statistics of the final resolution."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = network.build(torch.device("cpu"))
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), state["average"], strict=True):
            parameter.copy_(mean)
    world = World(load(BankSpec(), bank), state["seed"], torch.device("cpu"))
    network.recalibrate(model, world)
    return model


def config(model: nn.Module) -> dict[str, object]:
    """timm's Hugging Face hub layout."""
    size = network.FINAL_SIZE
    return {
        "architecture": network.ARCHITECTURE,
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": network.MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "generated",
            "description": "Pretrained by cnnft's research/pretrain on generated images only.",
            "license": "apache-2.0",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "crop_mode": "center",
            "mean": network.MEAN,
            "std": network.STD,
            "num_classes": 0,
            "pool_size": [size // 32, size // 32],
            "first_conv": "conv1.0",
            "classifier": "fc",
        },
    }


def write(model: nn.Module, folder: Path) -> None:
    """model.safetensors in fp16 and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(model), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the --output of training")
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=Path("cnnft/models/builtin"))
    args = parser.parse_args()
    write(averaged(args.run / CHECKPOINT, args.bank), args.to)


if __name__ == "__main__":
    main()
