"""Settings that go together."""

import json

import pytest

from cnnft.config.recipes import RECIPES, expand
from cnnft.config.schema import Config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config_and_names_only_what_differs(name):
    settings = RECIPES[name].settings
    config, plain = Config.of("x", **settings).to_dict(), Config.of("x").to_dict()
    assert all(config[key] != plain.get(key) for key in settings)


def test_what_is_given_wins():
    assert expand({"data": "x", "epochs": 3}) == {"data": "x", "epochs": 3}
    values = expand({"data": "x", "recipe": "standard", "epochs": 3})
    assert values == RECIPES["standard"].settings | {"data": "x", "epochs": 3}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("given", "gone"),
    [({"optimizer": "nadam"}, {"lr", "head_lr", "weight_decay"}),
     ({"mode": "feature-extractor"}, {"lr", "train_stages"}),
     ({"mode": "auto"}, {"lr", "train_stages"}),
     ({"pretrained": False}, {"lr", "train_stages"})],
)  # fmt: skip
def test_what_a_setting_makes_meaningless_is_left_out(name, given, gone):
    values = expand({"data": "x", "recipe": name, **given})
    assert not gone & values.keys()
    Config.of(**values)


def test_what_fits_a_recipe_leaves_it_whole():
    values = expand({"data": "x", "recipe": "fast", "optimizer": "adamw"})
    assert values == RECIPES["fast"].settings | {"data": "x"}
    averaged = Config.of(**expand({"data": "x", "recipe": "thorough", "ema": 0.9}))
    assert averaged.averaging.snapshots is None and averaged.schedule.schedule == "cosine"


def test_the_command_lists_them(cnnft):
    listed = json.loads(cnnft("recipes", "--json").out)
    assert [row["name"] for row in listed] == list(RECIPES)
    assert all(row["settings"] == RECIPES[row["name"]].settings for row in listed)
    shown = cnnft("recipes").out
    assert "--train-stages 3" in " ".join(shown.split()) and "--no-probe-first" in shown


@pytest.mark.slow
def test_a_recipe_from_the_command_line_and_from_a_file(cnnft, flat, tmp_path):
    flags = ("--backbone", "builtin", "--image-size", 32, "--workers", 0, "--epochs", 1)
    flags += ("--runs-dir", tmp_path / "runs")
    assert cnnft("finetune", flat, "--recipe", "fast", *flags, "--name", "a").code == 0
    file = tmp_path / "recipe.toml"
    file.write_text(f'data = "{flat.as_posix()}"\nrecipe = "fast"\n')
    assert cnnft("finetune", "--config", file, *flags, "--name", "b").code == 0
    one, other = ((tmp_path / "runs" / name / "config.toml").read_text() for name in "ab")
    assert one.replace('name = "a"', "") == other.replace('name = "b"', "")
    assert 'optimizer = "adamw"' in one and "train_stages = 1" in one and "recipe =" not in one
    again = cnnft("finetune", "--config", tmp_path / "runs" / "a" / "config.toml", "--name", "c")
    assert again.code == 0
    weights = [(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_recipes_that_cannot_be(cnnft, flat, tmp_path):
    cnnft("finetune", flat, "--recipe", "fats").fails_with(2, "--recipe", "did you mean fast")
    file = tmp_path / "x.toml"
    file.write_text('data = "x"\n')
    file.write_text('data = "x"\nrecipe = ["fast"]\n')
    cnnft("finetune", "--config", file).fails_with(2, "unknown --recipe")
    refused = cnnft("finetune", "--config", file, "--recipe", "fast")
    refused.fails_with(2, "--recipe", "--config")
    cnnft("finetune", "--resume", tmp_path, "--recipe", "fast").fails_with(2, "--recipe")
