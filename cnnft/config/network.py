"""Settings of the network: which backbone, which head, what is frozen."""

from dataclasses import dataclass
from pathlib import Path

from cnnft.config.choices import BatchNorm, Head, HeadInit, Mode
from cnnft.config.options import Bounds, below, option
from cnnft.config.panels import FREEZING, MAIN, MODEL, REGULARIZATION

FEATURE_VIEWS = 8


@dataclass(frozen=True)
class NetworkConfig:
    """The backbone, its pretrained weights, and the new head."""

    backbone: str = option(
        "resnet18",
        "Pretrained network: a timm name, torchvision/NAME, hf-hub:OWNER/NAME, local-dir:PATH, or "
        "builtin (needs no network).",
        panel=MAIN,
        metavar="NAME",
    )
    weights: str | Path | None = option(
        None,
        "Pretrained weights of the backbone, .safetensors or .pth.",
        panel=MODEL,
        shown="downloaded once",
        metavar="FILE",
    )
    pretrained: bool = option(
        True, "Start from pretrained or from random weights.", panel=MODEL, shown="pretrained"
    )
    head: Head = option("linear", "New classifier: one linear layer, or an MLP.", panel=MODEL)
    head_init: HeadInit = option("default", "Initialisation of the new head.", panel=MODEL)
    dropout: float = option(
        0.0, "Dropout before the head.", bounds=below(0, 1), panel=REGULARIZATION, metavar="P"
    )
    drop_path: float = option(
        0.0,
        "Stochastic depth: rate at which images skip the last block.",
        bounds=below(0, 1),
        panel=REGULARIZATION,
        metavar="P",
    )


@dataclass(frozen=True)
class FreezingConfig:
    """How much of the backbone trains, and what the frozen part does."""

    mode: Mode = option(
        "finetune",
        "finetune: train all layers; feature-extractor: a new head on the frozen backbone; "
        "bn-only: head and normalisation layers; auto: by the data.",
        panel=MAIN,
    )
    train_stages: int | None = option(
        None,
        "Fine-tune the last N stages only (see cnnft backbones).",
        bounds=Bounds(0),
        panel=FREEZING,
        shown="all",
        metavar="N",
    )
    # None: where pretrained layers train and the head is one linear layer.
    probe_first: bool | None = option(
        None,
        "Start from a head fitted on frozen features (linear probe).",
        panel=FREEZING,
        shown="if pretrained layers train",
    )
    batchnorm: BatchNorm = option(
        "auto",
        "Running statistics of BatchNorm layers that train: update or freeze them; auto: freeze "
        "below 8 images per batch.",
        panel=FREEZING,
    )
    # None: 8 in mode feature-extractor, a new one in every epoch elsewhere.
    feature_views: int | None = option(
        None,
        "Augmented views of each image whose frozen features are cached.",
        bounds=Bounds(1),
        panel=FREEZING,
        shown=str(FEATURE_VIEWS),
        metavar="K",
    )
