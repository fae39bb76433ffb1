"""Predictions as rows: a table, CSV, JSON or JSON lines, while they come."""

import json
from collections.abc import Iterator
from itertools import islice
from textwrap import indent
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from cnnft.cli.tables import table
from cnnft.machine.files import csv_line

if TYPE_CHECKING:
    from cnnft.inference.classifier import Prediction

Form = Literal["json", "jsonl", "csv"]

_ROWS = 1000  # of a table, which has to be whole before it is drawn


def texts(predictions: "Iterator[Prediction]", top: int, form: Form) -> Iterator[str]:
    """The document in pieces, one for each prediction and some around them."""
    if form == "json":
        return _json(predictions)
    if form == "csv":
        return _csv(predictions, top)
    return (json.dumps(_record(prediction)) + "\n" for prediction in predictions)


def tables(predictions: "Iterator[Prediction]", top: int) -> Iterator[Table]:
    while some := list(islice(predictions, _ROWS)):
        yield _table(some, top)


def _record(prediction: "Prediction") -> dict[str, Any]:
    return {
        "file": str(prediction.file),
        "label": prediction.label,
        "probability": prediction.top[0][1] if prediction.top else None,
        "top": [{"class": name, "probability": p} for name, p in prediction.top],
        "error": prediction.error,
    }


def _json(predictions: "Iterator[Prediction]") -> Iterator[str]:
    """What `json.dumps` makes of the list, indented by 2."""
    before = "["
    for prediction in predictions:
        yield f"{before}\n{indent(json.dumps(_record(prediction), indent=2), '  ')}"
        before = ","
    yield "\n]\n"


def _csv(predictions: "Iterator[Prediction]", top: int) -> Iterator[str]:
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    columns = [f"{what}{rank}" for rank in ranks for what in ("label", "probability")]
    yield csv_line(["file", *columns, "error"])
    for prediction in predictions:
        cells = [value for pair in prediction.top for value in pair] or [""] * len(columns)
        yield csv_line([prediction.file, *cells, prediction.error or ""])


def _table(predictions: "list[Prediction]", top: int) -> Table:
    ranks = [(f"{rank}.", "") for rank in range(2, top + 1)]
    head = ["file", "class", "probability", *(name for rank in ranks for name in rank)]
    return table(head, map(_row, predictions), numbers=range(2, len(head), 2))


def _row(prediction: "Prediction") -> list[object]:
    if prediction.error is not None:
        return [prediction.file, Text(prediction.error, style="red")]
    return [prediction.file, *(cell for name, p in prediction.top for cell in (name, f"{p:.1%}"))]
