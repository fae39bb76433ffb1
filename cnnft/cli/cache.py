"""cnnft cache: what is kept for later runs, and how to be rid of it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options

if TYPE_CHECKING:
    from cnnft.cache.store import Entry


def command(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all of it; it is computed again when needed.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what is kept on the disk for later runs: decoded images, features."""
    from cnnft.cache.store import clear as remove_all
    from cnnft.cache.store import entries, gigabytes, limit, root

    found = remove_all() if clear else entries()
    total = sum(entry.bytes for entry in found)
    if json:
        described = {"folder": str(root()), "bytes": total, "limit": limit()}
        console.result_json(described | {"entries": [asdict(entry) for entry in found]})
    elif clear:
        console.result(f"removed {len(found)} file(s), {gigabytes(total)}, from {root()}")
    else:
        if found:
            console.result(_table(found))
        console.result(
            f"{gigabytes(total)} of at most {gigabytes(limit())} in {root()} "
            "(CNNFT_CACHE_LIMIT in GB, CNNFT_CACHE)"
        )


def _table(found: "list[Entry]") -> Any:
    from rich.table import Table

    from cnnft.cache.store import gigabytes

    table = Table(box=None, pad_edge=False)
    for column in ("kind", "what", "file"):
        table.add_column(column)
    table.add_column("size", justify="right")
    table.add_column("last used")
    for entry in found:
        used = entry.used.isoformat(" ", "minutes")
        about = console.printable(entry.about)
        table.add_row(entry.kind, about, entry.path.name, gigabytes(entry.bytes), used)
    return table
