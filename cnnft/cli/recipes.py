"""cnnft recipes: settings that go together."""

from cnnft.cli import console, options
from cnnft.config.recipes import RECIPES
from cnnft.config.schema import flag


def command(json: options.Json = False) -> None:
    """List the recipes that finetune --recipe takes."""
    if json:
        rows = [{"name": name, **recipe._asdict()} for name, recipe in RECIPES.items()]
        console.result_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "is", "settings that differ from the defaults"):
        table.add_column(column, overflow="fold")
    for name, recipe in RECIPES.items():
        table.add_row(name, recipe.words, ", ".join(_words(recipe.settings)))
    console.result(table)


def _words(settings: dict[str, object]) -> list[str]:
    return [
        f"{flag(name)} {value}"
        if not isinstance(value, bool)
        else flag(name if value else f"no_{name}")
        for name, value in settings.items()
    ]
