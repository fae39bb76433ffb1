"""cnnft recipes: settings that go together."""

from cnnft.cli import console, options
from cnnft.cli.tables import table
from cnnft.config.recipes import RECIPES
from cnnft.config.schema import flag


def command(json: options.Json = False) -> None:
    """List the recipes: presets of settings for finetune --recipe."""
    if json:
        console.result_json([{"name": name, **r._asdict()} for name, r in RECIPES.items()])
        return
    head = ("recipe", "what it is", "settings that differ from the defaults")
    rows = [(name, r.words, ", ".join(_words(r.settings))) for name, r in RECIPES.items()]
    console.result(table(head, rows))


def _words(settings: dict[str, object]) -> list[str]:
    return [
        f"{flag(name)} {value}"
        if not isinstance(value, bool)
        else flag(name if value else f"no_{name}")
        for name, value in settings.items()
    ]
