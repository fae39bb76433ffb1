"""Settings of the data, of the machine, and of the run directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cnnft.config.choices import Cache, Layout, Precision
from cnnft.config.options import Bounds, above, between, option
from cnnft.config.panels import DATA, MACHINE, MAIN, RUN


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how train and val are separated."""

    data: str | Path = option("", "Image folder.")
    layout: Layout = option(
        "auto",
        "Layout of DATA. flat: DATA/CLASS; split: DATA/train/CLASS; class-split: "
        "DATA/CLASS/train; auto: by the names of the folders.",
        panel=DATA,
    )
    include_hidden: bool = option(
        False,
        "Read hidden and system files and folders too (.name, @eaDir, __MACOSX).",
        panel=DATA,
        switch=True,
    )
    val_fraction: float = option(
        0.2,
        "Fraction of the images held out for validation, where DATA has no val folder.",
        bounds=between(0, 1),
        panel=DATA,
        metavar="P",
    )
    split_seed: int = option(
        0, "Seed of the train/val split; independent of --seed.", panel=DATA, metavar="N"
    )
    strict: bool = option(
        False,
        "Stop where an image or a file is left out, instead of naming it.",
        panel=DATA,
        switch=True,
    )


@dataclass(frozen=True)
class MachineConfig:
    """Where and how to compute."""

    device: str = option("auto", "Device: auto, cpu, cuda or mps.", panel=MAIN, metavar="DEVICE")
    precision: Precision | Literal["auto"] = option(
        "auto",
        "Mixed-precision dtype (autocast): float32, bfloat16 or float16; weights stay float32.",
        panel=MACHINE,
        shown="auto, 16 bits on CUDA",
        metavar="DTYPE",
    )
    compile: bool = option(
        False,
        "Compile the network (torch.compile): takes a minute, and makes the steps of a long "
        "training faster.",
        panel=MACHINE,
        switch=True,
    )
    sync_bn: bool = option(
        False,
        "SyncBatchNorm: batch statistics over the images of all GPUs.",
        panel=MACHINE,
        switch=True,
    )
    workers: int | None = option(
        None,
        "Data-loading worker processes.",
        bounds=Bounds(0),
        panel=MACHINE,
        shown="half of the CPUs, at most 8",
        metavar="N",
    )
    read_timeout: float = option(
        60.0,
        "Seconds to wait for images that are needed, from a disk or network that may be gone.",
        bounds=above(0),
        panel=MACHINE,
        metavar="SECONDS",
    )
    cache: Cache = option(
        "auto",
        "Where decoded images and features are cached: in ram, on disk for later runs too (see "
        "cnnft cache), or off. Changes no result.",
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
        "Name of the run; a number is added where it is taken.",
        panel=MAIN,
        shown="DATA-BACKBONE",
        metavar="NAME",
    )
    runs_dir: str | Path = option("runs", "Folder of the runs.", panel=RUN, metavar="DIR")
    force: bool = option(
        False, "Replace the run of the same name.", panel=RUN, switch=True, saved=False
    )
    checkpoint_every: str = option(
        "5m",
        "Checkpoint interval, besides every epoch: 90s, 5m, 2h, or a number of steps.",
        panel=RUN,
        metavar="TIME|STEPS",
    )
    tensorboard: bool = option(False, "Log to TensorBoard too.", panel=RUN, switch=True)
