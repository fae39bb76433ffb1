"""What a training run is asked to do: one frozen, validated record. Standard library only."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from cnnft import distributed
from cnnft.errors import UsageError

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
TestTimeViews = Literal["none", "hflip", "five-crop", "ten-crop"]
Split = Literal["val", "test", "all"]
ExportFormat = Literal["head", "safetensors", "onnx"]


LARGEST_IMAGE = 8192
"""Pixels of a side that a network is given; a description that says more is damaged."""

_LARGEST_STATISTIC = 1e6
_LONGEST_NAME = 200  # file systems take 255, and names count up
RARE_AUGMENTATION = {
    "rotation": 180, "translation": 1, "shear": 89, "perspective": 1, "crop_and_pad": 0.9,
    "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5, "sharpness": 100,
    "blur": 5, "noise": 1, "pca": 10,
}  # fmt: skip
"""Parts of the augmentation that a config file alone sets -> the most that they may be."""
_MOST = {**RARE_AUGMENTATION, "erase": 1, "mixup": 100, "cutmix": 100}
_WITHOUT_FLAG = {
    "data", "momentum", "step_epochs", "step_gamma", "milestones", "inverse_epochs",
    "restart_epochs", "restart_multiplier", "cycle_rise", "plateau_patience", "vflip",
    *RARE_AUGMENTATION,
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
    epochs: int = 25  # as PyTorch's transfer-learning tutorial
    batch_size: int | Literal["auto"] = 32  # per step, in all processes; auto: what fits
    micro_batch: int | None = None  # computed at once in each process; None: all
    lr: float | None = None  # of the pretrained layers; None: the 1/10 rule
    head_lr: float | None = None  # of the new head; None: the rate of training from scratch
    optimizer: str = "sgd"
    momentum: float = 0.9  # of sgd and of what is made from it
    weight_decay: float = 0.0
    decay_all: bool = False  # normalisation layers and biases too
    warmup_epochs: float = 0.0  # the rates rise to their full size; then the schedule begins
    schedule: Schedule = "cosine"
    step_epochs: int = 7  # step: every 7 epochs; exponential: smoothly over 7 epochs ...
    step_gamma: float = 0.1  # ... the rate falls to a tenth; so do multistep's and plateau's
    milestones: str | None = None  # multistep: "30,60,90"; None: half and three quarters of all
    inverse_epochs: float = 1.0  # inverse: after this many the rate is half
    restart_epochs: float | None = None  # the first cosine; None: so that three fill the training
    restart_multiplier: int = 2  # each cosine is as many times longer than the one before
    cycle_rise: float = 0.3  # one-cycle: the share of the training in which the rate rises
    plateau_patience: int = 3  # plateau: epochs without a lower loss on val that are put up with
    val_fraction: float = 0.2
    split_seed: int = 0
    seed: int = 0
    workers: int | None = None  # None: half of the processors, at most 8
    device: str = "auto"
    checkpoint_every: str = "5m"  # or steps; besides one after each epoch
    skip_nonfinite: int = 0  # steps that may be left out because their loss is NaN or infinite
    sync_bn: bool = False  # with several GPUs: BatchNorm over the whole batch
    strict: bool = False
    runs_dir: str | Path = "runs"
    name: str | None = None  # None: <data folder>-<backbone>
    force: bool = field(default=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f.name, getattr(self, f.name), f.type)
            _check_text(f.name, getattr(self, f.name))
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        if isinstance(self.batch_size, int):
            _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        micro = self.micro_batch
        _require(micro is None or micro >= 1, "micro_batch", micro, "at least 1")
        _require(self.skip_nonfinite >= 0, "skip_nonfinite", self.skip_nonfinite, "at least 0")
        _require(self.step_epochs >= 1, "step_epochs", self.step_epochs, "at least 1")
        _require(0 < self.step_gamma <= 1, "step_gamma", self.step_gamma, "above 0, at most 1")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0, below 1")
        decayed = self.weight_decay
        _require(0 <= decayed < float("inf"), "weight_decay", decayed, "at least 0 and finite")
        self._check_schedule()
        parse_interval(self.checkpoint_every)
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0, below 2^63")
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "at least 0")
        for rate in ("lr", "head_lr"):
            value = getattr(self, rate)
            _require(value is None or 0 < value < float("inf"), rate, value, "above 0 and finite")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0, below 1")
        for part, most in _MOST.items():
            value = getattr(self, part)
            fits = value is None or 0 <= value <= most
            _require(fits, part, value, f"at least 0, at most {most}")
        decay = self.layer_decay
        _require(decay is None or 0 < decay <= 1, "layer_decay", decay, "above 0, at most 1")
        stages = self.train_stages
        _require(stages is None or stages >= 0, "train_stages", stages, "at least 0")
        size = self.image_size
        fits = size is None or 16 <= size <= LARGEST_IMAGE
        _require(fits, "image_size", size, f"at least 16 pixels, at most {LARGEST_IMAGE}")
        if self.normalize not in ("pretrained", "dataset"):
            parse_statistics(self.normalize)
        if self.decay_all and not self.weight_decay:
            raise UsageError("--decay-all goes with --weight-decay: give both, or neither")
        if stages is not None and self.mode != "finetune":
            raise UsageError("--train-stages goes with --mode finetune")
        if self.lr is not None and self.mode == "auto":
            raise UsageError(
                "--lr with --mode auto, which may train no pretrained layer: name a mode"
            )
        if self.layer_decay is not None and self.mode == "feature-extractor":
            raise UsageError("--layer-decay is about pretrained layers, which are frozen here")
        if self.head == "mlp" and self.probe_first:
            raise UsageError("--probe-first fits a linear head: leave out --head mlp")
        if self.head == "mlp" and self.head_init == "zeros":
            raise UsageError("--head-init zeros: an mlp of zeros learns nothing; choose another")
        if self.batchnorm == "frozen" and not self.pretrained:
            raise UsageError("--batchnorm frozen: random weights have no statistics to keep")
        if self.lr is not None and self.mode == "feature-extractor":
            raise UsageError(
                "--lr sets the rate of the pretrained layers, which feature-extractor mode "
                "freezes: use --head-lr"
            )
        if self.weights is not None and not self.pretrained:
            raise UsageError("--weights and --no-pretrained contradict each other: leave one out")
        if self.weights is not None and self.backbone == "builtin":
            raise UsageError("--weights goes with a named backbone; builtin brings its own weights")
        if self.name is not None and (
            self.name in {"", ".", ".."} or Path(self.name).name != self.name
        ):
            raise UsageError(
                f"--name {self.name!r:.100} must be a plain folder name (see --runs-dir)"
            )
        if self.name is not None and len(self.name.encode()) > _LONGEST_NAME:
            raise UsageError(f"--name {self.name[:20]}… is too long: {_LONGEST_NAME} bytes at most")

    def _check_schedule(self) -> None:
        """A schedule of which training would see nothing is a mistake."""
        warmup, restart = self.warmup_epochs, self.restart_epochs
        slow, longer, rise = self.inverse_epochs, self.restart_multiplier, self.cycle_rise
        patience = self.plateau_patience
        within = f"at least 0, below --epochs {self.epochs}"
        _require(0 <= warmup < self.epochs, "warmup_epochs", warmup, within)
        _require(0 < slow < float("inf"), "inverse_epochs", slow, "above 0 and finite")
        _require(1 <= longer <= 100, "restart_multiplier", longer, "at least 1, at most 100")
        _require(0 < rise < 1, "cycle_rise", rise, "between 0 and 1")
        _require(patience >= 0, "plateau_patience", patience, "at least 0")
        if restart is not None:
            _require(restart > 0, "restart_epochs", restart, "above 0")
            if self.schedule == "cosine-restarts" and restart >= self.epochs - warmup:
                raise UsageError(
                    f"restart_epochs {restart:g}: training ends before the first restart; lower "
                    "it, or take --schedule cosine"
                )
        first, last = self.milestone_epochs[0], self.milestone_epochs[-1]
        if self.schedule == "multistep" and not warmup < first <= last < self.epochs:
            raise UsageError(
                f"milestones {first:g} to {last:g}: each must come after the warm-up, "
                f"--warmup-epochs {warmup:g}, and before the end, --epochs {self.epochs}"
            )
        if self.schedule == "one-cycle" and warmup:
            raise UsageError(
                "--warmup-epochs with --schedule one-cycle, which rises by itself: leave it out "
                "(cycle_rise in the config file says for how long)"
            )

    @property
    def milestone_epochs(self) -> tuple[float, ...]:
        """After which multistep falls; half and three quarters of training (He et al., 2016)."""
        if self.milestones is None:
            return self.epochs / 2, self.epochs * 3 / 4
        return parse_milestones(self.milestones)

    @property
    def images_per_step(self) -> int:
        """`batch_size`, where auto is settled."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

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


Channels = tuple[float, float, float]


def parse_statistics(text: str) -> tuple[Channels, Channels]:
    """ "0.5,0.5,0.5/0.2,0.2,0.2" -> (mean, std) of red, green and blue, as shares of 255.

    Raises:
        UsageError: it has another form.
    """
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
        if not are_statistics(mean, std):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--normalize {text!r:.100}: give pretrained, dataset, or three means and three "
            "standard deviations, such as 0.5,0.5,0.5/0.2,0.2,0.2"
        ) from error
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def parse_milestones(text: str) -> tuple[float, ...]:
    """ "30,60,90" -> (30.0, 60.0, 90.0), epochs in rising order.

    Raises:
        UsageError: it has another form.
    """
    try:
        epochs = tuple(float(part) for part in text.split(","))
        if not all(a < b for a, b in pairwise((0.0, *epochs, float("inf")))):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"milestones {text!r:.100}: give epochs in rising order, such as '30,60,90'"
        ) from error
    return epochs


def parse_interval(text: str) -> tuple[float, float]:
    """ "90s", "5m", "2h" -> (seconds, inf), "500" -> (inf, steps).

    Raises:
        UsageError: it has another form.
    """
    seconds = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    number = text if seconds is None else text[:-1]
    try:
        value = float(number) if seconds else int(number)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--checkpoint-every {text!r}: give a time such as 90s, 5m or 2h, or a number of steps"
        ) from error
    return (value * seconds, float("inf")) if seconds else (float("inf"), value)


def are_statistics(mean: tuple[object, ...], std: tuple[object, ...]) -> bool:
    """Whether these can be means and standard deviations of three channels.

    Their size is bounded so that float32 pixels survive them.
    """
    numbers = [value for value in (*mean, *std) if isinstance(value, int | float)]
    bounded = all(abs(value) <= _LARGEST_STATISTIC for value in numbers)
    spread = all(value >= 1 / _LARGEST_STATISTIC for value in numbers[3:])
    return len(mean) == len(std) == 3 and len(numbers) == 6 and bounded and spread


def _require(holds: bool, name: str, value: object, bounds: str) -> None:
    if not holds:
        raise UsageError(f"{_flag(name)} {value!s:.100} is out of range: it must be {bounds}")


def _check_type(name: str, value: object, annotation: Any) -> None:
    """A config file may hold anything: check against the field's annotation."""
    is_literal = get_origin(annotation) is Literal
    options = (annotation,) if is_literal else get_args(annotation) or (annotation,)
    literals = [option for option in options if get_origin(option) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    types = tuple(option for option in options if option not in literals)
    if float in types:
        types += (int,)
    if value in choices if choices and isinstance(value, str) else _is_a(value, types):
        return
    if choices:
        raise UsageError(
            f"{_flag(name)} {value!r:.100} is unknown: choose one of {', '.join(choices)}"
        )
    raise UsageError(f"{_flag(name)} {value!r:.100} is not of the right type")


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def _check_text(name: str, value: object) -> None:
    """A run's files are UTF-8; a path may be any bytes, which Python holds as surrogates."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{_flag(name)} {value!s:.100} is not UTF-8: rename it") from error


def _flag(name: str) -> str:
    """How the user knows the setting: by its flag, or by its name in a config file."""
    return name if name in _WITHOUT_FLAG else "--" + name.replace("_", "-")
