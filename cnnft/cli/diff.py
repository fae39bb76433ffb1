"""cnnft diff RUN_A RUN_B: differences between two runs, with a paired test of their accuracies."""

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.cli.tables import table

if TYPE_CHECKING:
    from cnnft.analysis.compare import Comparison, DataDifference, Paired, Rows
    from cnnft.metrics import Score

_MOST = 5  # changed files shown; --json has all
_LONGEST = 100  # characters of a value; --json has all
_METHOD = "exact McNemar test; Tango's score interval"


def command(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run directory.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="The run to compare it with.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two runs: settings, images, versions and scores."""
    from cnnft.analysis.compare import compare
    from cnnft.runs.run import Run

    found = compare(Run.open(run_a), Run.open(run_b))
    if json:
        console.result_json({"a": run_a, "b": run_b, **_json(found)})
        return
    console.result(f"A               {run_a}\nB               {run_b}\n")
    _rows("settings", found.settings, "default")
    _data(found.data)
    _rows("network", found.network, "none or unknown")
    if found.versions is None:
        _line("versions", _unknown(found, "versions"))
    else:
        _rows("versions", found.versions, "unknown")
    _metrics(found)


def _line(name: str, text: str) -> None:
    console.result(f"{name:<16}{console.printable(text)}")


def _unknown(found: "Comparison", what: str) -> str:
    return f"unknown: {' and '.join(found.unknown[what])} made before runs kept them"


def _rows(name: str, rows: "Rows", none: str) -> None:
    if not rows:
        _line(name, "no difference")
        return
    _table(name, [(key, _text(a, none), _text(b, none)) for key, (a, b) in rows.items()])


def _table(name: str, rows: list[tuple[str, str, str]]) -> None:
    console.result(table((f"{name:<14}", "A", "B"), rows))


def _text(value: Any, none: str) -> str:
    text = none if value is None else str(value)
    if re.fullmatch(r"[0-9a-f]{40,64}", text):  # a hash: its first digits tell it from another
        return text[:12] + "…"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _data(data: "DataDifference") -> None:
    if not data.any:
        train, val = data.n[0].values()
        _line("data", f"no difference ({train} train, {val} val)")
        return
    rows = [
        (text, str(a), str(b))
        for split in data.n[0]
        for text, (a, b) in (
            (f"{split} images", (data.n[0][split], data.n[1][split])),
            ("  not in other", (data.only[0][split], data.only[1][split])),
        )
    ]
    _table("data", rows)
    for name, changes in (
        ("other class", [change for change in data.changed if change.label[0] != change.label[1]]),
        ("other split", [change for change in data.changed if change.split[0] != change.split[1]]),
    ):
        if changes:
            _line(name, f"{len(changes)} image(s) of both")
        for change in changes[:_MOST]:
            a, b = (f"{change.split[i]}/{change.label[i]}" for i in (0, 1))
            _line("", f"{change.file[1]}: {a} in A, {b} in B")
        if len(changes) > _MOST:
            _line("", f"… {len(changes) - _MOST} more: --json lists all")


def _metrics(found: "Comparison") -> None:
    a, b = found.metrics
    note = _selected(found)
    if a == b and found.paired is not None and found.paired.same:
        _line("metrics", f"no difference (val accuracy {a.val.accuracy:.1%}, {note})")
        return
    rows = [("best epoch", str(a.best_epoch), str(b.best_epoch))]
    rows.append(("val accuracy", _accuracy(a.val), _accuracy(b.val)))
    rows.append(("val loss", f"{a.val.loss:.4f}", f"{b.val.loss:.4f}"))
    _table("metrics", rows)
    _line("", note)
    if found.unknown["predictions"]:
        _line("paired", _unknown(found, "predictions"))
    elif found.paired is None:
        _line("paired", "no validation image is shared: nothing to test")
    else:
        _paired(found.paired)


def _selected(found: "Comparison") -> str:
    a, b = (metrics.evidence for metrics in found.metrics)
    if a != b:
        return f"A: {a}; B: {b}"
    return f"{a}, so both are optimistic" if a == "selected on val" else a


def _accuracy(val: "Score") -> str:
    low, high = val.interval
    return f"{val.accuracy:.1%} ({low:.1%} to {high:.1%}, n = {val.n})"


def _paired(paired: "Paired") -> None:
    low, high = paired.interval
    a, b = (count / paired.n for count in paired.correct)
    _line(
        "paired",
        f"on the {paired.n} validation images of both ({paired.not_shared[0]} are A's alone, "
        f"{paired.not_shared[1]} B's): A {a:.1%}, B {b:.1%}",
    )
    _line(
        "",
        f"B - A = {100 * paired.difference:+.1f} points (95% interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}); right in A only: {paired.only[0]}, in B only: {paired.only[1]}; "
        f"p = {paired.p:.2g} ({_METHOD})",
    )


def _json(found: "Comparison") -> dict[str, Any]:
    paired = found.paired
    return {
        "settings": _pairs(found.settings),
        "data": {
            "n": _pair(found.data.n),
            "only": _pair(found.data.only),
            "changed": [
                {key: _pair(pair) for key, pair in dataclasses.asdict(change).items()}
                for change in found.data.changed
            ],
        },
        "network": _pairs(found.network),
        "versions": None if found.versions is None else _pairs(found.versions),
        "metrics": _pair((found.metrics[0].to_dict(), found.metrics[1].to_dict())),
        "paired": None
        if paired is None
        else {
            "note": _selected(found),
            "n": paired.n,
            "not_shared": _pair(paired.not_shared),
            "correct": _pair(paired.correct),
            "only_right": _pair(paired.only),
            "difference": paired.difference,
            "interval95": paired.interval,
            "p": paired.p,
            "method": _METHOD,
        },
        "unknown": found.unknown,
    }


def _pair(values: tuple[Any, Any]) -> dict[str, Any]:
    return {"a": values[0], "b": values[1]}


def _pairs(rows: "Rows") -> dict[str, dict[str, Any]]:
    return {name: _pair(values) for name, values in rows.items()}
