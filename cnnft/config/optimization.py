"""Settings of training: steps, loss, optimizer, schedule, weight averaging."""

from dataclasses import dataclass
from typing import Literal

from cnnft.config.choices import ClassWeights, Sampling, Schedule
from cnnft.config.options import Bounds, above, below, between, option
from cnnft.config.panels import (
    AVERAGING,
    DISTILLATION,
    IMBALANCE,
    MAIN,
    OPTIMIZATION,
    REGULARIZATION,
)
from cnnft.config.texts import parse_milestones

TEMPERATURE = 4.0
DISTILL_WEIGHT = 0.5


@dataclass(frozen=True)
class TrainingConfig:
    """Epochs and batches."""

    # As PyTorch's transfer-learning tutorial.
    epochs: int = option(
        25, "Passes over the training images.", bounds=Bounds(1), panel=MAIN, metavar="N"
    )
    batch_size: int | Literal["auto"] = option(
        32,
        "Images per step, over all processes; auto: about ten steps per epoch, as memory allows.",
        bounds=Bounds(1),
        panel=MAIN,
        metavar="N|auto",
    )
    micro_batch: int | None = option(
        None,
        "Gradient accumulation: images per forward pass in each process; they add up to "
        "--batch-size.",
        bounds=Bounds(1),
        panel=OPTIMIZATION,
        shown="the whole batch",
        metavar="N",
    )
    sampling: Sampling = option(
        "shuffled",
        "Order of training images. shuffled: each once per epoch; balanced: oversampling, all "
        "classes equally often, with replacement.",
        panel=IMBALANCE,
    )
    patience: int | None = option(
        None,
        "Early stopping: end after N epochs without improvement on val.",
        bounds=Bounds(1),
        panel=REGULARIZATION,
        shown="off",
        metavar="N",
    )
    skip_nonfinite: int = option(
        0,
        "Skip up to N steps whose loss is NaN or infinite, instead of stopping.",
        bounds=Bounds(0),
        panel=OPTIMIZATION,
        metavar="N",
    )
    seed: int = option(
        0,
        "Random seed; the same seed, CPU and threads give the same weights.",
        bounds=below(0, 2**63),
        panel=OPTIMIZATION,
        metavar="N",
    )

    @property
    def images_per_step(self) -> int:
        """`batch_size`, where auto is settled."""
        assert isinstance(self.batch_size, int)
        return self.batch_size


@dataclass(frozen=True)
class LossConfig:
    """What training minimises."""

    label_smoothing: float = option(
        0.0,
        "Label smoothing: probability mass spread over all classes; 0.1 is usual.",
        bounds=below(0, 1),
        panel=REGULARIZATION,
        metavar="P",
    )
    focal: float = option(
        0.0,
        "Focal loss gamma: down-weights examples that are already classified well; 2 is usual.",
        bounds=Bounds(0, 10),
        panel=IMBALANCE,
        shown="off",
        metavar="GAMMA",
    )
    class_weights: ClassWeights = option(
        "none", "Class weights in the loss; balanced: inverse class frequency.", panel=IMBALANCE
    )
    teacher: tuple[str, ...] = option(
        (),
        "Knowledge distillation: a teacher model whose soft targets are learned too; repeatable, "
        "an ensemble's probabilities are averaged.",
        panel=DISTILLATION,
        shown="none",
        metavar="RUN|FILE",
    )
    temperature: float | None = option(
        None,
        "Softmax temperature of the soft targets.",
        bounds=above(0),
        panel=DISTILLATION,
        shown=f"{TEMPERATURE:g}",
        metavar="T",
    )
    distill_weight: float | None = option(
        None,
        "Weight of the distillation loss; that of the labels has the rest.",
        bounds=above(0, 1),
        panel=DISTILLATION,
        shown=f"{DISTILL_WEIGHT:g}",
        metavar="P",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rates, and what is done to gradients and weights."""

    optimizer: str = option(
        "sgd",
        "Optimizer: sgd, plain-sgd, nesterov, adam, adamw, rmsprop, adagrad, adadelta, adamax, "
        "nadam, or another one of timm.optim.",
        panel=OPTIMIZATION,
        shown="sgd, momentum 0.9",
        metavar="NAME",
    )
    lr: float | None = option(
        None,
        "Learning rate of the pretrained layers.",
        bounds=above(0),
        panel=MAIN,
        shown="the 1/10 rule",
        metavar="RATE",
    )
    head_lr: float | None = option(
        None,
        "Learning rate of the new head.",
        bounds=above(0),
        panel=MAIN,
        shown="the 1/10 rule",
        metavar="RATE",
    )
    layer_decay: float | None = option(
        None,
        "Layer-wise learning-rate decay: factor from each stage to the one before.",
        bounds=above(0, 1),
        panel=OPTIMIZATION,
        shown="off",
        metavar="FACTOR",
    )
    momentum: float = option(0.9, "Momentum of sgd and its relatives.", bounds=below(0, 1))
    weight_decay: float = option(
        0.0,
        "Weight decay (L2) of all parameters but biases and those of normalisation layers.",
        bounds=Bounds(0),
        panel=REGULARIZATION,
        metavar="X",
    )
    decay_all: bool = option(
        False,
        "Weight decay of biases and normalisation layers too.",
        panel=REGULARIZATION,
        switch=True,
    )
    l1: float = option(
        0.0,
        "L1 penalty on the weights that weight decay applies to; with it an elastic net.",
        bounds=Bounds(0),
    )
    max_norm: float | None = option(
        None,
        "Max-norm constraint on the head's weights of each class.",
        bounds=above(0),
        shown="off",
    )
    clip_grad: float | None = option(
        None,
        "Gradient clipping: largest norm of all gradients together.",
        bounds=above(0),
        panel=OPTIMIZATION,
        shown="off",
        metavar="NORM",
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rates change over training."""

    schedule: Schedule = option(
        "cosine",
        "Learning-rate schedule: cosine, cosine-restarts, one-cycle, step, multistep, exponential, "
        "inverse, inverse-sqrt, plateau or constant.",
        panel=OPTIMIZATION,
        metavar="NAME",
    )
    warmup_epochs: float = option(
        0.0,
        "Linear warmup before the schedule begins, in epochs.",
        bounds=Bounds(0),
        panel=OPTIMIZATION,
        metavar="EPOCHS",
    )
    step_epochs: int = option(
        7,
        "step: epochs between decays; exponential: epochs in which the rate decays by step_gamma.",
        bounds=Bounds(1),
    )
    step_gamma: float = option(
        0.1, "Decay factor of step, multistep, exponential and plateau.", bounds=above(0, 1)
    )
    milestones: str | None = option(
        None,
        "multistep: epochs after which the rate decays, such as '30,60,90'.",
        shown="half and three quarters of training",
    )
    inverse_epochs: float = option(
        1.0,
        "inverse and inverse-sqrt: time constant in epochs; inverse has half the rate after it.",
        bounds=above(0),
    )
    restart_epochs: float | None = option(
        None,
        "cosine-restarts: epochs of the first cosine.",
        bounds=above(0),
        shown="so that three fill the training",
    )
    restart_multiplier: int | None = option(
        None,
        "cosine-restarts: length of each cosine as a multiple of the one before.",
        bounds=Bounds(1, 100),
        shown="2; 1 with snapshots",
    )
    cycle_rise: float = option(
        0.3, "one-cycle: fraction of training in which the rate rises.", bounds=between(0, 1)
    )
    plateau_patience: int = option(
        3, "plateau: epochs without a lower val loss before the rate decays.", bounds=Bounds(0)
    )

    def milestone_epochs(self, epochs: int) -> tuple[float, ...]:
        """After which multistep falls; half and three quarters of training (He et al., 2016)."""
        if self.milestones is None:
            return epochs / 2, epochs * 3 / 4
        return parse_milestones(self.milestones)


@dataclass(frozen=True)
class AveragingConfig:
    """What becomes of the weights besides the best epoch: one of these at most."""

    ema: float | None = option(
        None,
        "Exponential moving average (EMA) of the weights: its decay; 0.99 is usual.",
        bounds=between(0, 1),
        panel=AVERAGING,
        shown="off",
        metavar="DECAY",
    )
    swa: int | None = option(
        None,
        "Stochastic weight averaging (SWA) over the last N epochs, at a constant learning rate.",
        bounds=Bounds(1),
        panel=AVERAGING,
        shown="off",
        metavar="N",
    )
    snapshots: int | None = option(
        None,
        "Snapshot ensemble: N models, one at the end of each cycle of cosine-restarts.",
        bounds=Bounds(2),
        panel=AVERAGING,
        shown="off",
        metavar="N",
    )
    recalibrate_bn: bool = option(
        True,
        "Recompute the statistics that BatchNorm layers learn from 512 training images before each "
        "evaluation, so that they fit the weights.",
        panel=AVERAGING,
    )

    @property
    def requested(self) -> list[str]:
        return [name for name in ("ema", "swa", "snapshots") if getattr(self, name)]
