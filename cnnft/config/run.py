"""Settings of the data, of the machine, and of the run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cnnft.config.choices import Cache, Layout, Precision
from cnnft.config.options import Bounds, between, option
from cnnft.config.panels import DATA, MACHINE, MAIN, RUN


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how train and val are separated."""

    data: str | Path = option("", "Image folder.")
    layout: Layout = option(
        "auto",
        "flat: DATA/CLASS; split: DATA/train/CLASS; class-split: DATA/CLASS/train; auto: by the "
        "folder's names.",
        panel=DATA,
    )
    val_fraction: float = option(
        0.2,
        "Share of the images held out as val where DATA has no val split.",
        bounds=between(0, 1),
        panel=MAIN,
        metavar="P",
    )
    split_seed: int = option(0, "Seed of the train/val split; independent of --seed.", panel=DATA)
    strict: bool = option(
        False, "Stop at a file that cannot be used instead of skipping it.", panel=DATA, switch=True
    )


@dataclass(frozen=True)
class MachineConfig:
    """Where and how to compute."""

    device: str = option("auto", "Where to compute.", panel=MAIN, metavar="auto|cpu|cuda|mps")
    precision: Precision | Literal["auto"] = option(
        "auto",
        "Mixed-precision dtype (autocast); weights and sums stay float32.",
        panel=MACHINE,
        shown="auto: 16 bits on CUDA, float32 elsewhere",
        metavar="DTYPE",
    )
    compile: bool = option(
        False,
        "torch.compile: a minute or so, for faster steps in a long training.",
        panel=MACHINE,
        switch=True,
    )
    sync_bn: bool = option(
        False, "SyncBatchNorm: statistics over all GPUs' images.", panel=MACHINE, switch=True
    )
    workers: int | None = option(
        None,
        "Worker processes that load images.",
        bounds=Bounds(0),
        panel=MACHINE,
        shown="half of the processors, at most 8",
        metavar="N",
    )
    cache: Cache = option(
        "auto",
        "Where decoded images and features are cached; disk: for later runs too (see cnnft "
        "cache). Changes no result.",
        panel=MACHINE,
    )

    @property
    def settled_precision(self) -> Precision:
        """`precision`, where auto is settled."""
        assert self.precision != "auto"
        return self.precision


@dataclass(frozen=True)
class RunConfig:
    """The run directory and what is written into it."""

    name: str | None = option(
        None,
        "Name of the run; numbered where it is taken.",
        panel=MAIN,
        shown="<data>-<backbone>",
        metavar="NAME",
    )
    runs_dir: str | Path = option("runs", "Folder of all runs.", panel=RUN, metavar="DIR")
    force: bool = option(
        False, "Replace a run of the same name.", panel=RUN, switch=True, saved=False
    )
    checkpoint_every: str = option(
        "5m",
        "Checkpoint interval besides every epoch: 90s, 5m, 2h, or steps.",
        panel=RUN,
        metavar="TIME|STEPS",
    )
    tensorboard: bool = option(False, "Log to TensorBoard too.", panel=RUN, switch=True)
