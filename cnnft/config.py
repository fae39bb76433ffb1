"""What a training run is asked to do: one frozen, validated record. Standard library only."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from cnnft import distributed
from cnnft.errors import UsageError
from cnnft.values import (
    Bounds,
    above,
    below,
    between,
    parse_interval,
    parse_milestones,
    parse_statistics,
    require_type,
    require_utf8,
)

# The closed choices of the command line and of Python, with the names that users type.
Mode = Literal["finetune", "feature-extractor", "bn-only", "auto"]
BatchNorm = Literal["auto", "train", "frozen"]
Head = Literal["linear", "mlp"]
HeadInit = Literal["default", "xavier", "kaiming", "zeros"]
Fit = Literal["crop", "squash", "pad"]
Augment = Literal["none", "basic", "standard", "strong", "trivial", "randaugment", "lecture"]
Schedule = Literal[
    "cosine", "cosine-restarts", "one-cycle", "step", "multistep", "exponential", "inverse",
    "inverse-sqrt", "plateau", "constant",
]  # fmt: skip
Sampling = Literal["shuffled", "balanced"]
ClassWeights = Literal["none", "balanced"]
Precision = Literal["float32", "bfloat16", "float16"]
TestTimeViews = Literal["none", "hflip", "five-crop", "ten-crop"]
Cache = Literal["auto", "ram", "disk", "off"]
Decoder = Literal["pillow", "draft"]
Split = Literal["val", "test", "all"]
ExportFormat = Literal["head", "safetensors", "onnx"]


LARGEST_IMAGE = 8192
"""Pixels of a side that a network is given; a description that says more is damaged."""

FEATURE_VIEWS = 8
_LONGEST_NAME = 200  # file systems take 255, and names count up
RARE_AUGMENTATION = {
    "rotation": 180, "translation": 1, "shear": 89, "perspective": 1, "crop_and_pad": 0.9,
    "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5, "sharpness": 100,
    "blur": 5, "noise": 1, "pca": 10,
}  # fmt: skip
"""Parts of the augmentation that a config file alone sets -> the most that they may be."""
WITHOUT_FLAG = {
    "data", "momentum", "l1", "max_norm", "step_epochs", "step_gamma", "milestones",
    "inverse_epochs", "restart_epochs", "restart_multiplier", "cycle_rise", "plateau_patience",
    "vflip", "train_resolution", *RARE_AUGMENTATION,
}  # fmt: skip
"""Rare settings, which a config file alone has."""
_BOUNDS = {
    **{part: Bounds(0, most) for part, most in RARE_AUGMENTATION.items()},
    "train_stages": Bounds(0), "layer_decay": above(0, 1), "image_size": Bounds(16, LARGEST_IMAGE),
    "dropout": below(0, 1), "drop_path": below(0, 1), "erase": Bounds(0, 1),
    "mixup": Bounds(0, 100), "cutmix": Bounds(0, 100), "label_smoothing": below(0, 1),
    "focal": Bounds(0, 10), "temperature": above(0), "distill_weight": above(0, 1),
    "epochs": Bounds(1), "micro_batch": Bounds(1), "lr": above(0), "head_lr": above(0),
    "momentum": below(0, 1), "weight_decay": Bounds(0), "l1": Bounds(0), "max_norm": above(0),
    "clip_grad": above(0), "step_epochs": Bounds(1), "step_gamma": above(0, 1),
    "inverse_epochs": above(0), "restart_epochs": above(0), "restart_multiplier": Bounds(1, 100),
    "cycle_rise": between(0, 1), "plateau_patience": Bounds(0), "patience": Bounds(1),
    "ema": between(0, 1), "swa": Bounds(1), "snapshots": Bounds(2), "val_fraction": between(0, 1),
    "workers": Bounds(0), "feature_views": Bounds(1), "skip_nonfinite": Bounds(0),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Every choice that `finetune` takes; a value out of range raises `UsageError` on construction.

    `force` is an order for one occasion, so it is not part of what a run saves.
    """

    data: str | Path
    backbone: str = "resnet18"
    weights: str | Path | None = None  # a file with the backbone's weights
    pretrained: bool = True
    mode: Mode = "finetune"
    train_stages: int | None = None  # mode finetune: this many last stages; None: all
    # Fit the head on frozen features before anything else trains. None: where pretrained layers
    # train and the head is one linear layer.
    probe_first: bool | None = None
    batchnorm: BatchNorm = "auto"  # of trained layers: their statistics; auto: by the batch size
    layer_decay: float | None = None  # each stage towards the input learns at this times the next
    head: Head = "linear"
    head_init: HeadInit = "default"
    dropout: float = 0.0  # on what enters the head
    drop_path: float = 0.0  # stochastic depth: share of images that skip the last block
    image_size: int | None = None  # None: as pretrained
    fit: Fit | None = None  # None: as the backbone's authors did
    normalize: str = "pretrained"  # or dataset, or MEAN/STD
    augment: Augment = "basic"  # of each part below, None: as it has it (docs/augmentation.md)
    hflip: bool | None = None  # mirror half of the images left to right
    vflip: bool | None = None  # ... upside down
    rotation: float | None = None  # degrees at most
    translation: float | None = None  # share of the side at most
    shear: float | None = None  # degrees at most
    perspective: float | None = None  # share by which corners move, in half of the images
    crop_and_pad: float | None = None  # padded by this share of the side, and cropped back
    brightness: float | None = None  # times up to 1 ± this; so too:
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None  # turned by a share of the colour circle at most
    sharpness: float | None = None  # times 1 + this, in half of the images
    blur: float | None = None  # Gaussian, sigma in pixels at most
    noise: float | None = None  # Gaussian, sigma, 255 being 1
    pca: float | None = None  # lighting noise: sigma of the principal components
    erase: float | None = None  # share of the images in which a rectangle is erased
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0: no image is mixed with another
    cutmix: float = 0.0  # alike; with both, one of them at random in each step
    label_smoothing: float = 0.0  # share of the label that goes to all classes alike
    focal: float = 0.0  # gamma: what is right already counts less
    class_weights: ClassWeights = "none"  # in the loss; balanced: all classes count alike
    sampling: Sampling = "shuffled"  # balanced: all classes are drawn alike, with replacement
    teacher: tuple[str, ...] = ()  # runs or exported files, whose logits are averaged
    temperature: float | None = None  # at which student and teachers are compared; None: 4
    distill_weight: float | None = None  # share of the loss that is the teachers'; None: half
    epochs: int = 25  # as PyTorch's transfer-learning tutorial
    batch_size: int | Literal["auto"] = 32  # per step, in all processes; auto: what fits
    micro_batch: int | None = None  # computed at once in each process; None: all
    lr: float | None = None  # of the pretrained layers; None: the 1/10 rule
    head_lr: float | None = None  # of the new head; None: the rate of training from scratch
    optimizer: str = "sgd"
    momentum: float = 0.9  # of sgd and of what is made from it
    weight_decay: float = 0.0
    decay_all: bool = False  # normalisation layers and biases too
    l1: float = 0.0  # of the same weights; with weight_decay an elastic net
    max_norm: float | None = None  # of the head's weights for each class
    clip_grad: float | None = None  # largest norm of all gradients together
    warmup_epochs: float = 0.0  # the rates rise to their full size; then the schedule begins
    schedule: Schedule = "cosine"
    step_epochs: int = 7  # step: every 7 epochs; exponential: smoothly over 7 epochs ...
    step_gamma: float = 0.1  # ... the rate falls to a tenth; so do multistep's and plateau's
    milestones: str | None = None  # multistep: "30,60,90"; None: half and three quarters of all
    inverse_epochs: float = 1.0  # inverse: after this many the rate is half
    restart_epochs: float | None = None  # the first cosine; None: so that three fill the training
    # Each cosine is as many times longer than the one before. None: 2; with snapshots 1.
    restart_multiplier: int | None = None
    cycle_rise: float = 0.3  # one-cycle: the share of the training in which the rate rises
    plateau_patience: int = 3  # plateau: epochs without a lower loss on val that are put up with
    patience: int | None = None  # stop after as many epochs without a better one
    ema: float | None = None  # decay of a running average of the weights, which is then the model
    swa: int | None = None  # so many last epochs at a constant rate, their weights averaged
    snapshots: int | None = None  # so many models, one at the end of each cosine, that vote
    recalibrate_bn: bool = False  # BatchNorm statistics anew over the training images, at the end
    val_fraction: float = 0.2
    split_seed: int = 0
    seed: int = 0
    # Training reads images reduced to as many pixels on the shorter side; auto: what the network's
    # input can use; full: as they are. Evaluation always reads them as they are.
    train_resolution: int | Literal["auto", "full"] = "auto"
    decoder: Decoder = "pillow"  # of training; draft: JPEGs as the nearest smaller size in the file
    # Where layers are frozen: epoch e sees view e modulo so many of each image. None: 8 in mode
    # feature-extractor, a new one in every epoch elsewhere.
    feature_views: int | None = None
    cache: Cache = "auto"  # where pixels are kept that every epoch reads
    workers: int | None = None  # None: half of the processors, at most 8
    device: str = "auto"
    # Of what training computes; weights and sums stay float32. auto: 16 bits on a CUDA GPU.
    precision: Precision | Literal["auto"] = "auto"
    compile: bool = False  # torch.compile: a minute or so, for faster steps
    checkpoint_every: str = "5m"  # or steps; besides one after each epoch
    skip_nonfinite: int = 0  # steps that may be left out because their loss is NaN or infinite
    tensorboard: bool = False
    sync_bn: bool = False  # with several GPUs: BatchNorm over the whole batch
    strict: bool = False
    runs_dir: str | Path = "runs"
    name: str | None = None  # None: <data folder>-<backbone>
    force: bool = field(default=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        if isinstance(self.teacher, list):  # as a config file has it
            object.__setattr__(self, "teacher", tuple(self.teacher))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require_type(flag(f.name), value, f.type)
            require_utf8(flag(f.name), value)
            if value is not None and f.name in _BOUNDS:
                _require(_BOUNDS[f.name].hold(value), f.name, value, _BOUNDS[f.name])
        if isinstance(self.batch_size, int):
            _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        if isinstance(self.train_resolution, int):
            fits = Bounds(16, LARGEST_IMAGE)
            holds = fits.hold(self.train_resolution)
            _require(holds, "train_resolution", self.train_resolution, fits)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0, below 2^63")
        within = f"at least 0, below --epochs {self.epochs}"
        _require(0 <= self.warmup_epochs < self.epochs, "warmup_epochs", self.warmup_epochs, within)
        if self.swa is not None:
            _require(self.swa < self.epochs, "swa", self.swa, f"below --epochs {self.epochs}")
        parse_interval(self.checkpoint_every)
        if self.normalize not in ("pretrained", "dataset"):
            parse_statistics(self.normalize)
        for sentence in (*self._contradictions(), *self._schedule_unseen(), *self._averages()):
            raise UsageError(sentence)

    def _contradictions(self) -> Iterator[str]:
        if self.decay_all and not self.weight_decay:
            yield "--decay-all goes with --weight-decay: give both, or neither"
        if self.train_stages is not None and self.mode != "finetune":
            yield "--train-stages goes with --mode finetune"
        if self.lr is not None and self.mode == "auto":
            yield "--lr with --mode auto, which may train no pretrained layer: name a mode"
        if self.layer_decay is not None and self.mode == "feature-extractor":
            yield "--layer-decay is about pretrained layers, which are frozen here"
        if self.drop_path and self.mode == "feature-extractor":
            yield "--drop-path is about pretrained layers, which are frozen here"
        if self.head == "mlp" and self.probe_first:
            yield "--probe-first fits a linear head: leave out --head mlp"
        if self.head == "mlp" and self.head_init == "zeros":
            yield "--head-init zeros: an mlp of zeros learns nothing; choose another"
        if self.batchnorm == "frozen" and not self.pretrained:
            yield "--batchnorm frozen: random weights have no statistics to keep"
        if self.lr is not None and self.mode == "feature-extractor":
            yield (
                "--lr sets the rate of the pretrained layers, which feature-extractor mode "
                "freezes: use --head-lr"
            )
        if self.weights is not None and not self.pretrained:
            yield "--weights and --no-pretrained contradict each other: leave one out"
        if self.weights is not None and self.backbone == "builtin":
            yield "--weights goes with a named backbone; builtin brings its own weights"
        whole = self.mode in ("finetune", "bn-only") and self.train_stages is None
        if self.feature_views is not None and whole:
            yield "--feature-views is about frozen layers: add --mode feature-extractor"
        if self.decoder == "draft" and self.train_resolution == "full":
            yield "--decoder draft reads reduced images, train_resolution full whole ones: choose"
        if self.class_weights == "balanced" and self.sampling == "balanced":
            yield "--class-weights and --sampling balanced make up for the same: leave one out"
        for setting in ("feature_views", "layer_decay", "drop_path"):
            if self.mode == "auto" and getattr(self, setting):
                yield f"{flag(setting)} with --mode auto, which may have no use for it: name a mode"
        if self.feature_views is not None and (self.mixup or self.cutmix):
            yield "--feature-views repeat, and mixed images do not: leave out one or the other"
        for setting in ("temperature", "distill_weight"):
            if getattr(self, setting) is not None and not self.teacher:
                yield f"{flag(setting)} is about a teacher: give one with --teacher RUN"
        name = self.name
        if name is not None and (name in {"", ".", ".."} or Path(name).name != name):
            yield f"--name {name!r:.100} must be a plain folder name (see --runs-dir)"
        if name is not None and len(name.encode()) > _LONGEST_NAME:
            yield f"--name {name[:20]}… is too long: {_LONGEST_NAME} bytes at most"

    def _schedule_unseen(self) -> Iterator[str]:
        """A schedule of which training would see nothing is a mistake."""
        warmup, restart = self.warmup_epochs, self.restart_epochs
        restarts = self.schedule == "cosine-restarts"
        if restarts and restart is not None and restart >= self.epochs - warmup:
            yield (
                f"restart_epochs {restart:g}: training ends before the first restart; lower "
                "it, or take --schedule cosine"
            )
        first, last = self.milestone_epochs[0], self.milestone_epochs[-1]
        if self.schedule == "multistep" and not warmup < first <= last < self.epochs:
            yield (
                f"milestones {first:g} to {last:g}: each must come after the warm-up, "
                f"--warmup-epochs {warmup:g}, and before the end, --epochs {self.epochs}"
            )
        if self.schedule == "one-cycle" and warmup:
            yield (
                "--warmup-epochs with --schedule one-cycle, which rises by itself: leave it out "
                "(cycle_rise in the config file says for how long)"
            )

    def _averages(self) -> Iterator[str]:
        """What becomes of the weights besides the best epoch: one thing at most."""
        asked = [flag(name) for name in ("ema", "swa", "snapshots") if getattr(self, name)]
        if len(asked) > 1:
            yield f"{' and '.join(asked)} each make a model of their own: choose one"
        if self.recalibrate_bn and (self.swa or self.snapshots):
            yield f"--recalibrate-bn is of the best epoch, not of {' '.join(asked)}: leave one out"
        if self.sync_bn and (self.swa or self.recalibrate_bn):
            yield "--sync-bn cannot compute statistics anew at the end: leave out one or the other"
        if self.patience is not None and (self.swa or self.snapshots):
            yield f"--patience may end training before {' '.join(asked)}: leave one out"
        if self.snapshots is None:
            return
        cycles = self.epochs - self.warmup_epochs
        if self.schedule != "cosine-restarts":
            yield (
                f"--snapshots are taken where the rate has fallen and rises again, and "
                f"--schedule {self.schedule} does not: add --schedule cosine-restarts"
            )
        if self.restart_epochs is not None or self.restart_multiplier not in (None, 1):
            yield "--snapshots share the epochs evenly: leave out restart_epochs and _multiplier"
        if cycles % self.snapshots:
            more = -cycles % self.snapshots
            yield (
                f"--epochs {self.epochs} cannot be shared evenly by --snapshots {self.snapshots}: "
                f"take {self.epochs + more:g}"
            )

    @property
    def views(self) -> int | None:
        """How many views of each image training has; None: a new one in every epoch.

        Where layers are frozen and a view comes again, what they make of it is known.
        """
        if self.mode == "feature-extractor" and not (self.mixup or self.cutmix):
            return min(self.feature_views or FEATURE_VIEWS, self.epochs)
        return None if self.feature_views is None else min(self.feature_views, self.epochs)

    @property
    def milestone_epochs(self) -> tuple[float, ...]:
        """After which multistep falls; half and three quarters of training (He et al., 2016)."""
        if self.milestones is None:
            return self.epochs / 2, self.epochs * 3 / 4
        return parse_milestones(self.milestones)

    @property
    def balanced(self) -> bool:
        """Whether training makes all classes count alike, whatever their numbers of images."""
        return "balanced" in (self.class_weights, self.sampling)

    @property
    def images_per_step(self) -> int:
        """`batch_size`, where auto is settled."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

    @property
    def settled_precision(self) -> Precision:
        """`precision`, where auto is settled."""
        assert self.precision != "auto"
        return self.precision

    @property
    def images_at_once(self) -> int:
        """How many images go through the network together in each process."""
        batch = self.batch_size if isinstance(self.batch_size, int) else 32
        own = max(batch // distributed.world, 1)
        return min(own, self.micro_batch or own)

    def to_dict(self) -> dict[str, Any]:
        """What a run saves: plain values only, absent where None; `Config(**...)` reads it back."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata.get("saved", True)
        }
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in values.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """`source` is named where a key is unknown or absent."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise UsageError(f"{source}: unknown setting {unknown[0]!r:.100}")
        if "data" not in values:
            raise UsageError(f"{source}: no data folder is given")
        return cls(**values)


def _require(holds: bool, name: str, value: object, bounds: object) -> None:
    if not holds:
        raise UsageError(f"{flag(name)} {value!s:.100} is out of range: it must be {bounds}")


def flag(name: str) -> str:
    """How the user knows the setting: by its flag, or by its name in a config file."""
    return name if name in WITHOUT_FLAG else "--" + name.replace("_", "-")
