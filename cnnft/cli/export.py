"""cnnft export RUN --format head|safetensors|onnx: a trained run as one file."""

from pathlib import Path
from typing import Annotated

import typer

from cnnft.cli import console, options
from cnnft.config.choices import ExportFormat


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            metavar="FORMAT",
            help="head (of a feature-extractor run), safetensors (all weights), or onnx.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="in the run", help="The file to write."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a trained run as one file."""
    from cnnft.analysis.export import export_model

    with console.progress() as bar:
        bar.add_task(f"exporting {format}", total=None)
        path = export_model(run, format, output)
    size = path.stat().st_size
    if json:
        console.result_json({"file": str(path), "format": format, "bytes": size})
        return
    shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    console.say(f"wrote {format}, {shown}")
    console.result(str(path))
