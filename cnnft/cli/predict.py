"""cnnft predict IMAGES -m RUN: what the classifier says of each file."""

import csv
import glob  # pathlib takes no absolute patterns
import io
import json as json_module
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cnnft import distributed
from cnnft.cli import console, options
from cnnft.errors import CnnftError, UsageError

if TYPE_CHECKING:
    from cnnft.classifier import Prediction
    from cnnft.data import Skipped

Format = Literal["table", "json", "jsonl", "csv"]


def command(
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, or patterns.", show_default=False)
    ],
    model: options.Model,
    tta: options.Tta = "none",
    top: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 1,
    format: Annotated[
        Format | None,
        typer.Option(show_default="by --output's suffix, or table", help="As what."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write there instead of to the screen.")
    ] = None,
    weights: options.Weights = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
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

    from cnnft.classifier import load

    classifier = load(model, weights=weights, device=device)
    predictions = classifier.stream(
        files,
        tta=tta,
        top=top,
        batch_size=batch_size,
        workers=workers,
    )
    done: list[Prediction] = []  # this process's
    with console.progress() as bar:
        task = bar.add_task("predicting", total=len(files))
        for prediction in predictions:
            done.append(prediction)
            bar.advance(task, distributed.world)
    done = distributed.gather(done)
    if not distributed.is_main:
        return
    _write(done, min(top, len(classifier.classes)), format, output)
    console.warn_of_skipped(skipped, "name a file to have it tried")
    failed = sum(prediction.error is not None for prediction in done)
    if failed == len(done):
        raise CnnftError(f"none of the {failed} file(s) could be read as an image")
    if failed:
        console.warn(f"{failed} of {len(done)} files could not be read; their rows say why")


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
    from cnnft.data import image_files

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


def _write(predictions: list["Prediction"], top: int, format: Format, output: Path | None) -> None:
    if format == "table":
        _table(predictions, top)
        return
    if format == "json":
        text = json_module.dumps([_record(p) for p in predictions], indent=2) + "\n"
    elif format == "jsonl":
        text = "".join(json_module.dumps(_record(p)) + "\n" for p in predictions)
    else:
        text = _csv(predictions, top)
    if output is None:
        console.result_text(text)
        return
    from cnnft.files import write_whole

    write_whole(output, text.encode("utf-8", errors="surrogateescape"))
    console.say(f"wrote {output}")


def _record(prediction: "Prediction") -> dict[str, Any]:
    return {
        "file": str(prediction.file),
        "label": prediction.label,
        "probability": prediction.top[0][1] if prediction.top else None,
        "top": [{"class": name, "probability": p} for name, p in prediction.top],
        "error": prediction.error,
    }


def _csv(predictions: Iterable["Prediction"], top: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    columns = [f"{what}{rank}" for rank in ranks for what in ("label", "probability")]
    writer.writerow(["file", *columns, "error"])
    for prediction in predictions:
        cells = [value for pair in prediction.top for value in pair] or [""] * len(columns)
        writer.writerow([prediction.file, *cells, prediction.error or ""])
    return text.getvalue()


def _table(predictions: Iterable["Prediction"], top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for rank in range(1, top + 1):
        table.add_column("class" if rank == 1 else f"{rank}.")
        table.add_column("probability" if rank == 1 else "", justify="right")
    for prediction in predictions:
        file = Text(console.printable(str(prediction.file)))
        if prediction.error is not None:
            table.add_row(file, Text(prediction.error, style="red"))
            continue
        cells = [Text(c) for name, p in prediction.top for c in (name, f"{p:.1%}")]
        table.add_row(file, *cells)
    console.result(table)
