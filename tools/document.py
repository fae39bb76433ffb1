"""Generated parts of a document, between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

import sys
from pathlib import Path


def fill(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers; exits where there are not two of them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = document.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        sys.exit(f"{document}: needs the lines {begin} and {end}, each once")
    before, after = content.split(begin)[0], content.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
