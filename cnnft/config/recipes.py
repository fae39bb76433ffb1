"""Settings that go together, by name; docs/recipes.md has what each was measured at."""

from typing import Any, NamedTuple

from cnnft.errors import UsageError, did_you_mean


class Recipe(NamedTuple):
    words: str
    settings: dict[str, Any]
    """Those of `Config` that differ from its defaults."""


_ADAMW = {"optimizer": "adamw", "weight_decay": 0.05}

RECIPES = {
    "fast": Recipe(
        "a first answer: the last stage alone",
        {"train_stages": 1, "epochs": 5, "lr": 1e-3, "head_lr": 1e-3, **_ADAMW},
    ),
    "standard": Recipe(
        "the last three stages",
        {"train_stages": 3, "epochs": 10, "lr": 3e-4, "head_lr": 1e-3, **_ADAMW},
    ),
    "thorough": Recipe(
        "a snapshot ensemble of three such networks, for better probabilities",
        {
            "train_stages": 3,
            "epochs": 24,
            "lr": 3e-4,
            "head_lr": 1e-3,
            **_ADAMW,
            "label_smoothing": 0.1,
            "schedule": "cosine-restarts",
            "snapshots": 3,
        },
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
            "recalibrate_bn": False,
            "train_resolution": "full",
        },
    ),
}

_OF_PRETRAINED_LAYERS = {"lr", "train_stages", "layer_decay", "drop_path"}
_OF_THE_OPTIMIZER = {"lr", "head_lr", "weight_decay"}


def expand(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in which "recipe" may name one -> the same with that recipe's, which yield to them.

    Of the recipe, rates do not outlive another optimizer, what it says of pretrained layers another
    mode or that there are none, snapshots another average or schedule.

    Raises:
        UsageError: there is no such recipe.
    """
    if "recipe" not in values:
        return values
    given = {key: value for key, value in values.items() if key != "recipe"}
    name = values["recipe"]
    if not isinstance(name, str) or name not in RECIPES:
        raise UsageError(f"unknown --recipe {name!r:.100}{did_you_mean(str(name), RECIPES)}")
    settings = RECIPES[name].settings
    left_out: set[str] = set()
    if given.get("optimizer") not in (None, settings.get("optimizer", "sgd")):
        left_out |= _OF_THE_OPTIMIZER
    if given.keys() & {"ema", "swa", "patience", "schedule"}:
        left_out |= {"snapshots", "schedule"}
    if "mode" in given or not given.get("pretrained", True):
        left_out |= _OF_PRETRAINED_LAYERS
    return {k: v for k, v in settings.items() if k not in left_out} | given
