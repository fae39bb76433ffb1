"""Counts that outlive the commands that make them: docs/results/NAME.json, which each adds to.

A file holds one record for each commit, seed and machine: row -> what was counted. It is written
whole after every count, so that a command may be interrupted at any time, and several may count.
"""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from cnnft.machine.files import to_json, write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "reliability.md"
"""Has the tables of what was counted."""
MOST = ("slowest",)
"""Of these the largest counts, not the sum."""


class Tally:
    """A file of counts, and the record in it that this command adds to."""

    def __init__(self, name: str, seed: int, file: Path | None = None) -> None:
        self.file = file or RESULTS / f"{name}.json"
        self.record: dict[str, Any] = {"commit": commit(), "seed": seed, "machine": machine()}

    def records(self) -> list[dict[str, Any]]:
        return json.loads(self.file.read_bytes())["records"] if self.file.exists() else []

    def add(
        self, rows: Mapping[str, Mapping[str, float]], words: Mapping[str, str] | None = None
    ) -> None:
        """`words`: what a command of a row said, of which the last is kept."""
        if not rows:
            return
        self.file.parent.mkdir(exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            records = self.records()
            mine = next((r for r in records if r.items() >= self.record.items()), None)
            if mine is None:
                mine = self.record | {"rows": {}}
                records.append(mine)
            for row, counts in rows.items():
                mine["rows"][row] = dict(joined(mine["rows"].get(row, {}), counts))
            if words:
                mine.setdefault("words", {}).update(words)
            write_whole(self.file, to_json({"records": records}))

    def sums(
        self, of: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> dict[str, Counter[str]]:
        """Row -> counts, over all records or those that `of` chooses."""
        total: dict[str, Counter[str]] = {}
        for record in filter(of, self.records()):
            for row, counts in record["rows"].items():
                total[row] = joined(total.get(row, {}), counts)
        return total

    def words(self, row: str) -> str:
        """The last that was said."""
        said = [record.get("words", {}).get(row, "") for record in self.records()]
        return next(filter(None, reversed(said)), "")


def joined(one: Mapping[str, float], other: Mapping[str, float]) -> Counter[str]:
    counts: Counter[str] = Counter(one)
    for name, count in other.items():
        counts[name] = max(counts[name], count) if name in MOST else counts[name] + count
    return counts


def commit() -> str:
    """That of the code which is tested; with a + where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "cnnft", "tools")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def machine() -> str:
    facts = f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores"
    versions = f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"
    return ", ".join(facts + versions)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
