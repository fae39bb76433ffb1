"""cnnft check DATA: what is wrong with a dataset, and how much to train on it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.cli.leftout import left_out_lines
from cnnft.cli.plan import advice_json, class_table, show_advice
from cnnft.config.choices import Augment, Fit
from cnnft.config.schema import Config
from cnnft.config.texts import Channels
from cnnft.errors import CnnftError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cnnft.data.checks import DataCheck, ImageFacts
    from cnnft.data.dataset import Dataset, Samples
    from cnnft.data.transforms import InputSpec
    from cnnft.training.advice import Advice

_MOST = 5  # groups and files shown of each finding; --json has all


def command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Image folder, as for finetune.")],
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Advise how much of this backbone to train on the images."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Pretrained weights of the backbone.")
    ] = None,
    layout: options.Layout = "auto",
    include_hidden: options.IncludeHidden = False,
    fit: Annotated[Fit | None, options.as_for_finetune("fit")] = None,
    show_augment: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Draw augmented views of a few images of each class."
        ),
    ] = None,
    augment: Annotated[Augment | None, options.as_for_finetune("augment")] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Augmentation settings without a flag, as for finetune."),
    ] = None,
    workers: options.Workers = None,
    read_timeout: options.ReadTimeout = options.READ_TIMEOUT,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check a dataset: unreadable files, duplicates, leaks; advise what to train."""
    from cnnft.data.augmentation import augmentation
    from cnnft.data.checks import PLAIN, Inspector, check_dataset
    from cnnft.data.contactsheet import contact_sheet
    from cnnft.data.reading import inspect_dataset
    from cnnft.data.sources import open_source
    from cnnft.machine.files import write_whole

    if backbone is None and (weights is not None or fit is not None):
        raise UsageError("--weights and --fit are about a network: give --backbone too")
    sheet = None if show_augment is None else _sheet_settings(data, augment, config)
    if sheet is None and (augment is not None or config is not None):
        raise UsageError("--augment and --config are about a sheet: give --show-augment FILE.png")
    if show_augment is not None and (
        show_augment.suffix.lower() != ".png" or show_augment.is_dir()
    ):
        raise UsageError(f"--show-augment {show_augment}: give the .png file to write")
    settings = None
    if backbone is not None:
        settings = Config.of(
            data=data, backbone=backbone, weights=weights, mode="auto", fit=fit, layout=layout,
            workers=workers, device=device, read_timeout=read_timeout,
        )  # fmt: skip
    spec = PLAIN if settings is None else _input_spec(settings)
    with console.progress() as bar:
        inspector = Inspector(spec, keep_crops=settings is not None)
        reading = console.reading_images(bar)
        source = open_source(data, layout, include_hidden=include_hidden, on_files=reading)
        dataset, facts = inspect_dataset(
            source, inspector, on_files=reading, read_timeout=read_timeout
        )
        found = check_dataset(dataset, facts)
    if sheet is not None and show_augment is not None:
        if backbone is None:
            spec = dataclasses.replace(spec, mean=found.mean, std=found.std)
        write_whole(
            show_augment, contact_sheet(dataset.train, spec, augmentation(sheet.augmentation))
        )
        console.say(f"wrote {show_augment}")
    settled, refusal = _settled(dataset)
    unscored = [] if settled is None else settled.splits["val"].empty_classes()
    advice = None
    if settings is not None and settled is not None:
        try:
            advice = _advise(settings, spec, settled.train, facts)
        except CnnftError as error:  # the findings are worth showing all the same
            console.warn(f"no advice: {error}")
    if json:
        console.result_json(
            {
                **_json(found),
                "unscored": unscored,
                "advice": None if advice is None else advice_json(advice),
                "finetune_refuses": refusal,
            }
        )
        return
    _show(found, unscored)
    if refusal is not None:
        console.warn(f"finetune stops at this: {refusal}")
    if advice is not None:
        console.result("")
        show_advice(advice, console.result)


def _settled(dataset: "Dataset") -> "tuple[Dataset | None, str | None]":
    """What `finetune` would train and select on, or why it would not."""
    from cnnft.data.split import train_and_val

    settings = Config.of(data=dataset.source).dataset
    try:
        return train_and_val(dataset, settings.val_fraction, settings.split_seed), None
    except CnnftError as error:
        return None, str(error)


def _input_spec(settings: Config) -> "InputSpec":
    """How the backbone sees images; nothing is built or downloaded."""
    from cnnft.models.identity import input_spec
    from cnnft.models.registry import described_beside, resolve

    weights, fit = settings.network.weights, settings.input.fit
    identity = resolve(settings.network.backbone, own_weights=weights is not None)
    if weights is not None:
        identity = described_beside(Path(weights), identity)
    spec = input_spec(identity)
    return spec if fit is None else dataclasses.replace(spec, fit=fit)


def _advise(
    settings: Config, spec: "InputSpec", train: "Samples", facts: "Mapping[str, ImageFacts]"
) -> "Advice":
    """By a probe of the last layer's features, on the images that were decoded already."""
    from cnnft.data.loading import Loading, worker_count
    from cnnft.machine.devices import choose_device, keep_freed_memory, place
    from cnnft.models.backbones import open_backbone
    from cnnft.probe.probe import Fitting, probe
    from cnnft.training.advice import advise_on

    device = choose_device(settings.machine.device)
    if device.type == "cpu":
        keep_freed_memory()
    network = settings.network
    backbone = open_backbone(network.backbone, len(train.classes), weights=network.weights)
    place(backbone.network, device)
    crops = {path: facts[path].crop for path in train.paths}
    kept = {path: crop for path, crop in crops.items() if crop is not None}
    workers = worker_count(settings.machine.workers)
    loading = Loading(
        32,
        workers if len(kept) < len(train) else 0,
        pinned=device.type == "cuda",
        read_timeout=settings.machine.read_timeout,
    )
    fitting = Fitting(always=True, about=Path(settings.dataset.data).name)
    probed = probe(backbone, spec, train, loading, fitting, kept)
    assert probed is not None
    return advise_on(train, probed.solved.accuracy)


def _sheet_settings(data: str, augment: Augment | None, config_file: str | None) -> Config:
    from cnnft.config.file import read_config_file

    values = {} if config_file is None else read_config_file(config_file)
    given: dict[str, Any] = {"data": data} | ({} if augment is None else {"augment": augment})
    return Config.from_dict(values | given, str(config_file))


def _show(found: "DataCheck", unscored: list[str]) -> None:
    console.result(class_table(found.counts))
    lines = [
        "",
        f"imbalance       {found.imbalance:.1f} : 1 between the largest and the smallest class",
        f"shorter side    {found.sizes['smallest']} to {found.sizes['largest']} px, "
        f"median {found.sizes['median']}",
        "modes           " + ", ".join(f"{mode} {n}" for mode, n in found.modes.items()),
        f"mean / std      {_channels(found.mean)}/{_channels(found.std)}",
    ]
    console.result("\n".join(lines))
    for note in found.notes:
        console.result(console.printable(note))
    _list("left out", left_out_lines(found.skipped), most=None)
    _list("classes that get no score: fewer than 2 images, or none in val", unscored)
    for name, groups in (
        ("the same file more than once", found.duplicates),
        ("images that look the same", found.near_duplicates),
        ("in train and elsewhere too", found.leaks),
        ("alike, but of different classes", found.contradictions),
    ):
        _list(name, [" = ".join(map(str, group)) for group in groups])


def _channels(values: Channels) -> str:
    return ",".join(f"{value:.3f}" for value in values)


def _list(name: str, findings: list[str], most: int | None = _MOST) -> None:
    if not findings:
        console.result(f"none            {name}")
        return
    console.result(f"{len(findings):<15} {name}")
    shown = len(findings) if most is None else most
    for text in findings[:shown]:
        console.result(f"                {console.printable(text)}")
    if len(findings) > shown:
        console.result(f"                … {len(findings) - _MOST} more: --json lists all")


def _json(found: "DataCheck") -> dict[str, Any]:
    return dataclasses.asdict(found) | {"imbalance": found.imbalance}
