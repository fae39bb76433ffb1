"""cnnft cache: the disk cache, shown or cleared."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cnnft.cli import console, options
from cnnft.cli.tables import table

if TYPE_CHECKING:
    from cnnft.cache.store import Entry


def command(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all entries; they are recomputed when needed.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show the disk cache of decoded images and features."""
    from cnnft.cache.store import clear as remove_all
    from cnnft.cache.store import entries, gigabytes, limit, root

    most = limit()
    found = remove_all() if clear else entries()
    total = sum(entry.bytes for entry in found)
    if json:
        described = {"folder": str(root()), "bytes": total, "limit": most}
        console.result_json(described | {"entries": [asdict(entry) for entry in found]})
    elif clear:
        console.result(f"removed {len(found)} file(s), {gigabytes(total)}, from {root()}")
    else:
        if found:
            head = ("kind", "of", "file", "size", "last used")
            console.result(table(head, map(_row, found), numbers=range(3, 4)))
        console.result(
            f"{gigabytes(total)} of at most {gigabytes(most)} in {root()} "
            "(CNNFT_CACHE_LIMIT in GB, CNNFT_CACHE)"
        )


def _row(entry: "Entry") -> tuple[str, ...]:
    from cnnft.cache.store import gigabytes

    used = entry.used.isoformat(" ", "minutes")
    return entry.kind, entry.about, entry.path.name, gigabytes(entry.bytes), used
