"""Settings that go together, by name; docs/recipes.md has what each was measured at."""

from typing import Any, NamedTuple

from cnnft.errors import UsageError, did_you_mean


class Recipe(NamedTuple):
    words: str
    settings: dict[str, Any]
    """Those of `Config` that differ from its defaults."""


RECIPES = {
    "fast": Recipe(
        "a first answer: the last stage alone, few epochs", {"train_stages": 1, "epochs": 5}
    ),
    "standard": Recipe("the defaults", {}),
    "thorough": Recipe(
        "the most accurate: longer, with more augmentation and averaged weights",
        {"epochs": 40, "augment": "standard", "label_smoothing": 0.1, "ema": 0.99},
    ),
    "tutorial": Recipe(
        "PyTorch's transfer-learning tutorial, to compare with",
        {
            "batch_size": 4,
            "lr": 0.001,
            "head_lr": 0.001,
            "schedule": "step",
            "probe_first": False,
            "batchnorm": "train",
            "train_resolution": "full",
        },
    ),
}

_OF_PRETRAINED_LAYERS = {"lr", "train_stages", "layer_decay", "drop_path"}
"""What a recipe says of them means nothing in a mode that it was not made for."""


def expand(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in which "recipe" may name one -> the same with that recipe's, which yield to them.

    Raises:
        UsageError: there is no such recipe.
    """
    if "recipe" not in values:
        return values
    given = {key: value for key, value in values.items() if key != "recipe"}
    name = values["recipe"]
    if name not in RECIPES:
        raise UsageError(f"unknown --recipe {name!r:.100}{did_you_mean(str(name), RECIPES)}")
    settings = RECIPES[name].settings
    if given.get("mode", "finetune") != settings.get("mode", "finetune"):
        settings = {k: v for k, v in settings.items() if k not in _OF_PRETRAINED_LAYERS}
    return settings | given
