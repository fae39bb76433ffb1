"""cnnft predict IMAGES -m RUN: the top-k classes of each image."""

import glob  # pathlib takes no absolute patterns
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import Progress

from cnnft.cli import console, options, rows
from cnnft.cli.leftout import warn_of_skipped
from cnnft.config.panels import MACHINE
from cnnft.errors import CnnftError, UsageError
from cnnft.machine import distributed

if TYPE_CHECKING:
    from cnnft.data.dataset import Skipped
    from cnnft.inference.classifier import Prediction

Format = Literal["table", "json", "jsonl", "csv"]


def command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES", help="Files, folders, or patterns.", show_default=False),
    ],
    model: options.Model,
    tta: options.Tta = "none",
    top: Annotated[
        int, typer.Option(min=1, metavar="K", help="Show the top-k classes of each image.")
    ] = 1,
    format: Annotated[
        Format | None,
        typer.Option(
            metavar="FORMAT",
            help="table, json, jsonl or csv; without it, the suffix of --output says, or table.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write, instead of standard output.")
    ] = None,
    weights: options.Weights = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    read_timeout: options.ReadTimeout = options.READ_TIMEOUT,
    precision: options.Precision = "float32",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            rich_help_panel=MACHINE,
            help="Compile the network (torch.compile): pays off from some thousand images on.",
        ),
    ] = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the classes of images."""
    if json and (output is not None or format not in (None, "json")):
        raise UsageError("--json prints one document: leave out --output and --format")
    format = "json" if json else _choose_format(format, output)
    if output is not None and output.is_dir():
        raise UsageError(f"--output {output} is a folder: give the file to write")
    files, skipped = _expand(images)

    from cnnft.inference.storage import load
    from cnnft.machine.devices import keep_freed_memory

    classifier = load(model, weights=weights, device=device)
    if classifier.device.type == "cpu":
        keep_freed_memory()
    stream = classifier.stream(
        files,
        tta=tta,
        top=top,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        compile=compile,
        read_timeout=read_timeout,
    )
    failures: Counter[bool] = Counter()
    with console.progress(beside_results=output is None and format != "table") as bar:
        predictions = _as_they_come(stream, bar, len(files))
        if not distributed.is_main:
            return
        counted = _count(predictions, failures)
        _write(counted, min(top, len(classifier.classes)), format, output, bar)
    if output is not None:
        console.say(f"wrote {output}")
    missed = [entry for entry in skipped if not entry.is_expected]
    warn_of_skipped(missed, "name a file to have it tried")
    failed = failures[True]
    if failed == len(files):
        raise CnnftError(f"none of the {failed} file(s) could be read as an image")
    if failed:
        console.warn(f"{failed} of {len(files)} files could not be read; their rows say why")


def _choose_format(format: Format | None, output: Path | None) -> Format:
    if output is None:
        return format or "table"
    by_suffix: dict[str, Format] = {".json": "json", ".jsonl": "jsonl", ".csv": "csv"}
    format = format or by_suffix.get(output.suffix.lower(), "table")
    if format == "table":
        raise UsageError(f"--output {output}: give --format json, jsonl or csv")
    return format


def _expand(arguments: list[str]) -> tuple[list[str], list["Skipped"]]:
    """The files to predict, and those of folders whose names are not an image's."""
    from cnnft.data.folders import image_files

    files: list[str] = []
    skipped: list[Skipped] = []
    for argument in arguments:
        if not argument:
            raise UsageError("an empty argument is no image: is a shell variable unset?")
        named = Path(argument)
        if named.exists() or named.is_symlink():
            matches = [named]
        else:
            matches = sorted(Path(m) for m in glob.glob(argument, recursive=True))  # noqa: PTH207
        if not matches:
            raise UsageError(f"{argument}: no such file or folder")
        before = len(files)
        for match in matches:
            images, others = image_files(match) if match.is_dir() else ([str(match)], [])
            files += images
            skipped += others
        if len(files) == before:
            raise CnnftError(f"{argument} holds no images")
    return files, skipped


def _as_they_come(
    predictions: Iterator["Prediction"], bar: Progress, total: int
) -> Iterator["Prediction"]:
    """Those of all processes, in the order of the files; of several processes all at once."""

    def mine() -> Iterator["Prediction"]:
        task = bar.add_task("predicting", total=total)
        for prediction in predictions:
            yield prediction
            bar.advance(task, distributed.world_size)

    return mine() if distributed.world_size == 1 else iter(distributed.gather(list(mine())))


def _count(predictions: Iterator["Prediction"], failures: Counter[bool]) -> Iterator["Prediction"]:
    """`predictions`; in the end `failures` says how many of them are errors, and how many not."""
    for prediction in predictions:
        failures[prediction.error is not None] += 1
        yield prediction


def _write(
    predictions: Iterator["Prediction"],
    top: int,
    format: Format,
    output: Path | None,
    bar: Progress,
) -> None:
    if output is not None:
        from cnnft.machine.files import writing_whole

        assert format != "table"
        with writing_whole(output) as file:
            for text in rows.texts(predictions, top, format):
                file.write(text.encode("utf-8", errors="surrogateescape"))
    elif format == "table":
        for table in rows.tables(predictions, top):
            bar.stop()  # it may be on the same terminal
            console.result(table)
            bar.start()
    else:
        for text in rows.texts(predictions, top, format):
            console.result_text(text)
