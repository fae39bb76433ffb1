"""Settings of the network: which backbone, which head, what is frozen."""

from dataclasses import dataclass
from pathlib import Path

from cnnft.config.choices import BatchNorm, FeatureDepth, Head, HeadInit, HeadSolver, Mode
from cnnft.config.options import Bounds, below, option
from cnnft.config.panels import FREEZING, MAIN, MODEL, REGULARIZATION

FEATURE_VIEWS = 8


@dataclass(frozen=True)
class NetworkConfig:
    """The backbone, its pretrained weights, and the new head."""

    backbone: str = option(
        "resnet18",
        "Pretrained network: a timm name, torchvision/NAME, hf-hub:OWNER/NAME, local-dir:PATH, or "
        "builtin (small, needs no download). cnnft backbones lists them.",
        panel=MAIN,
        metavar="NAME",
    )
    weights: str | Path | None = option(
        None,
        "Pretrained weights of the backbone, a .safetensors or .pth file.",
        panel=MODEL,
        shown="downloaded once",
        metavar="FILE",
    )
    pretrained: bool = option(
        True,
        "Start from pretrained weights, or train from scratch.",
        panel=MODEL,
        shown="pretrained",
    )
    head: Head = option("linear", "New classifier head: one linear layer, or an MLP.", panel=MODEL)
    head_init: HeadInit = option(
        "default",
        "Initialisation of the new head: default (the layer's own), xavier, kaiming or zeros.",
        panel=MODEL,
    )
    dropout: float = option(
        0.0,
        "Dropout probability before the head.",
        bounds=below(0, 1),
        panel=REGULARIZATION,
        metavar="P",
    )
    drop_path: float = option(
        0.0,
        "Stochastic depth (drop path): probability of skipping the last block; earlier blocks "
        "have less.",
        bounds=below(0, 1),
        panel=REGULARIZATION,
        metavar="P",
    )


@dataclass(frozen=True)
class FreezingConfig:
    """How much of the backbone trains, and what the frozen part does."""

    mode: Mode = option(
        "auto",
        "What trains. finetune: all layers; feature-extractor: a new head on the frozen "
        "backbone; bn-only: the head and the normalisation layers; auto: a new head, and the last "
        "stages too where that is clearly better on val.",
        panel=MAIN,
    )
    train_stages: int | None = option(
        None,
        "Fine-tune the last N stages only and freeze those before (see cnnft backbones).",
        bounds=Bounds(0),
        panel=FREEZING,
        shown="all",
        metavar="N",
    )
    # None: where pretrained layers train and the head is one linear layer.
    probe_first: bool | None = option(
        None,
        "Initialise the head by a linear probe of the frozen features (LP-FT).",
        panel=FREEZING,
        shown="if pretrained layers train",
    )
    head_solver: HeadSolver = option(
        "auto",
        "How a head on a frozen backbone is found. lbfgs: logistic regression, its penalty by "
        "cross-validation on all images; sgd: trained by steps; auto: lbfgs unless another option "
        "is about steps.",
        panel=FREEZING,
    )
    folds: int = option(
        5, "Folds of the cross-validation.", bounds=Bounds(2, 100), panel=FREEZING, metavar="K"
    )
    features: FeatureDepth = option(
        "auto",
        "What a solved head reads. last: what enters the network's own head; stages: the pooled "
        "outputs of the last stages beside it; auto: the lower log-loss out of fold.",
        panel=FREEZING,
    )
    ensemble: bool = option(
        False,
        "Average the probabilities of the head and of the network whose last stages were trained "
        "(mode auto).",
        panel=MAIN,
        switch=True,
    )
    batchnorm: BatchNorm = option(
        "auto",
        "Running statistics of BatchNorm layers that train: update (train) or keep (frozen) them; "
        "auto: frozen where a batch has fewer than 8 images.",
        panel=FREEZING,
    )
    # None: 8 in mode feature-extractor, a new one in every epoch elsewhere.
    feature_views: int | None = option(
        None,
        "Augmented views of each image; the frozen features of each view are cached.",
        bounds=Bounds(1),
        panel=FREEZING,
        shown=str(FEATURE_VIEWS),
        metavar="K",
    )
