"""Records of the benchmark -> tables in Markdown, and which targets are met.

A record is what one process came to: group (kind and network), row, round, and either seconds,
memory and the row's facts, or why it is absent.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Group

Record = dict[str, Any]
Bound = Callable[[int], float]
"""Of K views the most that caching features can give."""
LIMIT = "limit"
TIMES_FASTER, SHARE_OF_LIMIT, SECOND_RUN, PREDICT_FASTER = 25, 0.95, 5.0, 1.5
"""The targets."""
EPOCHS = 25
"""With which the first of them is meant."""
FLAT = 1.1
"""What memory of 100 times as many images may be of that of the fewest."""


@dataclass(frozen=True)
class Results:
    """Records of one group."""

    group: Group
    records: Sequence[Record]

    def of(self, row: str) -> list[Record]:
        """By rounds."""
        return [r for r in self.records if r["row"] == row and "absent" not in r]

    def why_absent(self, row: str) -> str | None:
        return next((r["absent"] for r in self.records if r["row"] == row and "absent" in r), None)

    def values(self, row: str, what: str) -> list[Any]:
        return [r[what] for r in self.of(row) if r.get(what) is not None]

    def median(self, row: str, what: str) -> float | None:
        return statistics.median(self.values(row, what)) if self.values(row, what) else None

    def paired(
        self, first: str, second: str, value: Callable[[Record, Record], float]
    ) -> list[float]:
        """`value` of the records of both rows in each round that has both."""
        others = {r["round"]: r for r in self.of(second)}
        return [value(r, others[r["round"]]) for r in self.of(first) if r["round"] in others]

    def ratios(self, row: str) -> list[float]:
        """How many times as fast as the baseline, in each round."""
        return self.paired(self.group.baseline, row, lambda a, b: a["seconds"] / b["seconds"])


def spread(values: Sequence[float], format: str = ".2f") -> str:
    """Median and range."""
    if not values:
        return "–"
    low, middle, high = min(values), statistics.median(values), max(values)
    text = f"{middle:{format}}"
    return text if len(values) == 1 else f"{text} [{low:{format}}, {high:{format}}]"


def table(results: Results, bound: Bound | None) -> str:
    """One group."""
    group, on_gpu = results.group, any(r.get("gpu_memory") for r in results.records)
    heads = ["", f"times as fast as {group.baseline}", *(["bound"] if bound else [])]
    heads += ["seconds", "accuracy", "memory, MB", *(["on the GPU, MB"] if on_gpu else [])]
    heads += ["rounds"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in group.rows:
        if row.name == LIMIT:
            continue
        if reason := results.why_absent(row.name):
            lines.append(_line([row.name, f"not there: {reason}", *[""] * (len(heads) - 2)]))
            continue
        if not results.of(row.name):
            continue
        views = results.median(row.name, "views")
        limits = [f"{bound(int(views)):.1f}" if views else ""] if bound else []
        accuracy = results.values(row.name, "accuracy")
        cells = [row.name, spread(results.ratios(row.name)) if accuracy else "", *limits]
        cells += [spread(results.values(row.name, "seconds"), ".1f")]
        cells += [spread([100 * a for a in accuracy], ".1f") + " %" if accuracy else ""]
        cells += [_megabytes(results.median(row.name, "memory"))]
        cells += [_megabytes(results.median(row.name, "gpu_memory"))] if on_gpu else []
        cells += [str(len(results.of(row.name)))]
        lines.append(_line(cells))
    return "\n".join(lines)


def growth_table(results: Results) -> str:
    """Of ever larger rows: time and memory, and what they are of those of the first."""
    heads = ["", "seconds", "of the first", "memory, MB", "of the first"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in results.group.rows:
        if reason := results.why_absent(row.name):
            lines.append(_line([row.name, f"not there: {reason}", "", "", ""]))
            continue
        cells = [row.name]
        for what, shown in (("seconds", "{:.1f}".format), ("memory", _megabytes)):
            own, first = (results.median(name, what) for name in (row.name, results.group.baseline))
            cells += [shown(own), f"{own / first:.2f}"] if own and first else ["–", "–"]
        lines.append(_line(cells))
    return "\n".join(lines)


def limit_lines(results: Results) -> list[str]:
    """What the network alone reaches in memory, and how far cnnft and the tutorial loop are."""
    found = [record["throughput"] for record in results.of(LIMIT)]
    if not found:
        return []
    plain = max(_plain(found[0]), key=lambda kind: _middle(found, kind))
    lines = [
        "Images in memory as tensors, of forward, backward and SGD: "
        + "; ".join(f"{kind} {_middle(found, kind):.1f} images/s" for kind in found[0])
        + f". The limit is {plain}.",
        "",
        "| | training alone, of the limit | times as fast as the tutorial | of which compute "
        "| of which loading |",
        "|---|---|---|---|---|",
    ]
    for row in results.group.rows:
        if not results.values(row.name, "images_per_second"):
            continue
        figures = [shares(results, row.name), *_split(results, row.name)]
        lines.append(_line([row.name, *map(spread, figures)]))
    return lines


def shares(results: Results, row: str) -> list[float]:
    """Training's images per second in the row's epochs, of those of the limit, by rounds."""

    def share(run: Record, limit: Record) -> float:
        reached = limit["throughput"]
        return run["images_per_second"] / max(reached[kind] for kind in _plain(reached))

    return results.paired(row, LIMIT, share)


def _plain(reached: dict[str, float]) -> list[str]:
    return [kind for kind in reached if kind.startswith("plain")]


def _split(results: Results, row: str) -> tuple[list[float], list[float], list[float]]:
    """How many times as fast as the tutorial loop training is, and two factors of it: the steps on
    tensors in memory, and the rest, which is loading. Of others' loops they are not known."""
    ratios = results.paired(
        results.group.baseline, row, lambda a, b: b["images_per_second"] / a["images_per_second"]
    )
    kind = "cnnft" if row.startswith("cnnft") else row
    limits = [record["throughput"] for record in results.of(LIMIT)]
    if any(kind not in limit for limit in limits):
        return ratios, [], []
    compute = [limit[kind] / limit["tutorial"] for limit in limits]
    return ratios, compute, [r / c for r, c in zip(ratios, compute, strict=False)]


Target = tuple[str, str, bool | None]
"""What is wanted, what was measured, and whether that will do; None: it was not measured."""


def targets(groups: Sequence[Results], bound: Bound, epochs: int) -> str:
    """A table of those targets that `groups` are about."""
    lines = [_line(["target", "measured", ""]), _line(["---"] * 3)]
    for found in groups:
        for target, measured, met in _targets(found, bound, epochs):
            verdict = "not measured" if met is None else "met" if met else "**not met**"
            lines.append(_line([f"{found.group.kind}: {target}", measured, verdict]))
    return "\n".join(lines)


def _targets(found: Results, bound: Bound, epochs: int) -> Iterable[Target]:
    """Speed is asked of the network with random weights, accuracy of the other."""
    kind = found.group.kind, found.group.pretrained
    if kind == ("feature-extractor", False):
        yield _faster_than_the_tutorial(found, bound(1), epochs)
        yield _a_second_run(found)
    elif kind == ("feature-extractor", True):
        yield _as_accurate(found)
    elif kind == ("finetune", False):
        reached = shares(found, "cnnft")
        target = f"training at {SHARE_OF_LIMIT:.0%} of the limit or better"
        yield target, spread(reached), _at_least(reached, SHARE_OF_LIMIT)
    elif kind == ("predict", False):
        faster = found.ratios("cnnft")
        target = f"at least {PREDICT_FASTER:g} times as fast as timm's inference script"
        yield target, spread(faster), _at_least(faster, PREDICT_FASTER)
    elif found.group.network.startswith("predict"):
        yield _flat_memory(found)


def _faster_than_the_tutorial(found: Results, bound: float, epochs: int) -> Target:
    faster = found.ratios("cnnft, K = 1")
    baseline = _beyond_start_up(found, "tutorial", "tutorial")
    own = _beyond_start_up(found, "cnnft, K = 1", "cnnft")
    beyond = [a / b for a, b in zip(baseline, own, strict=False)]
    without = f"; without start-up of both {spread(beyond)}" if beyond else ""
    return (
        f"with K = 1 at least {TIMES_FASTER} times as fast as the tutorial loop",
        f"{spread(faster)}{without}; the bound is {bound:.1f}",
        _at_least(faster, TIMES_FASTER) if epochs == EPOCHS else None,
    )


def _beyond_start_up(found: Results, row: str, of: str) -> list[float]:
    """Seconds of the row without those of imports, by rounds."""
    return found.paired(row, f"start-up of {of}", lambda a, b: a["seconds"] - b["seconds"])


def _a_second_run(found: Results) -> Target:
    beyond = _beyond_start_up(found, "cnnft, again", "cnnft")
    return (
        f"a second run under {SECOND_RUN:g} s plus start-up",
        f"{spread(beyond, '.1f')} s",
        statistics.median(beyond) < SECOND_RUN if beyond else None,
    )


def _as_accurate(found: Results) -> Target:
    differences = found.paired("tutorial", "cnnft", lambda a, b: b["accuracy"] - a["accuracy"])
    return (
        f"accuracy with the default K at least the tutorial loop's ({found.group.network})",
        f"{spread([100 * d for d in differences], '+.1f')} points",
        _at_least(differences, 0),
    )


def _flat_memory(found: Results) -> Target:
    first, last = found.group.rows[0], found.group.rows[-1]
    least, most = found.median(first.name, "memory"), found.median(last.name, "memory")
    more = most / least if least and most else None
    return (
        f"memory of predict flat, from {first.name} to {last.name}",
        f"{more:.2f} times" if more else "–",
        more <= FLAT if more else None,
    )


def _at_least(values: Sequence[float], least: float) -> bool | None:
    return statistics.median(values) >= least if values else None


def _middle(found: Sequence[dict[str, float]], kind: str) -> float:
    return statistics.median(throughput[kind] for throughput in found)


def _megabytes(number: float | None) -> str:
    return "–" if number is None else f"{number / 1e6:,.0f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """The processor, its number, and the memory, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = Path("/proc/meminfo")
    kilobytes = int(memory.read_text().split()[1]) if memory.exists() else 0
    return f"{len(names)} × {names[0]}, {kilobytes / 1e6:.0f} GB" if names else "unknown"
