"""Write docs/options.md: every setting of finetune, from its declaration.

python -m tools.options
"""

from itertools import groupby
from pathlib import Path
from typing import get_args, get_origin

from cnnft.config.options import choices_of, option_of, shown_default
from cnnft.config.panels import PANELS
from cnnft.config.schema import FIELDS, flag
from tools.document import fill

DOCUMENT = Path(__file__).parents[1] / "docs" / "options.md"
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


def tables() -> str:
    """Markdown: a table for each panel of `--help`, and one of what the config file alone has."""
    settings = [field for name, field in FIELDS.items() if name != "data"]
    settings.sort(key=lambda field: _place(option_of(field).panel))
    parts = []
    for panel, fields in groupby(settings, key=lambda field: option_of(field).panel):
        parts.append(f"## {panel or 'In the config file alone'}\n")
        parts.append("| setting | value | default | what it does |\n|---|---|---|---|")
        parts += [_row(field) for field in fields]
        parts.append("")
    return "\n".join(parts).rstrip()


def _place(panel: str | None) -> int:
    return len(PANELS) if panel is None else PANELS.index(panel)


def _row(field) -> str:
    declared = option_of(field)
    name = f"`{flag(field.name)}`"
    if declared.panel is not None and flag(field.name) != f"--{field.name}":
        name += f", `{field.name}`"
    value = _value(field.type) + (f", {declared.bounds}" if declared.bounds else "")
    cells = (name, value, shown_default(field), declared.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(annotation) -> str:
    """int | Literal["auto"] | None -> "integer or auto"."""
    kinds = get_args(annotation) or (annotation,)
    words = [_TYPES[kind] for kind in kinds if kind in _TYPES]
    if Path in kinds:  # which may be given as a text
        words = ["path"]
    if get_origin(annotation) is tuple:
        words = ["list of texts"]
    return ", ".join([*words, *(f"`{choice}`" for choice in choices_of(annotation))])


if __name__ == "__main__":
    fill(DOCUMENT, "options", tables())
