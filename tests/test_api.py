"""Three lines of Python do what the commands do."""

import importlib
import pkgutil

import pytest

import cnnft
from cnnft import CnnftError, Config, finetune, load


def test_three_lines(flat, tmp_path, capfd):
    run = finetune(
        flat, backbone="builtin", mode="feature-extractor", epochs=1, runs_dir=tmp_path, workers=0
    )
    predictions = load(run.path).predict([flat / "ants" / "0.png", flat / "bees" / "1.png"])
    assert [p.file.name for p in predictions] == ["0.png", "1.png"]
    for prediction in predictions:
        assert {name for name, _ in prediction.top} == {"ants", "bees"}
        assert sum(p for _, p in prediction.top) == pytest.approx(1)
        assert prediction.label == prediction.top[0][0]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""  # the library never prints


def test_functions_stay_callable_after_every_submodule_is_imported():
    for module in pkgutil.walk_packages(cnnft.__path__, "cnnft."):
        if module.name != "cnnft.__main__":
            importlib.import_module(module.name)
    for name in cnnft.__all__:
        assert callable(getattr(cnnft, name)), name


def test_settings_win_over_the_recipe(flat, tmp_path):
    run = finetune(
        flat, recipe="tutorial", backbone="builtin", mode="feature-extractor", epochs=1,
        runs_dir=tmp_path, workers=0, batch_size=10,
    )  # fmt: skip
    config = run.config()
    assert (config.optim.head_lr, config.optim.lr, config.schedule.schedule) == (
        0.001,
        None,
        "step",
    )
    assert (config.training.epochs, config.training.batch_size) == (1, 10)


def test_unknown_settings_and_recipes_are_told(flat):
    with pytest.raises(CnnftError, match="unknown setting 'epoch'"):
        finetune(flat, epoch=1)
    with pytest.raises(CnnftError, match="did you mean fast"):
        finetune(flat, recipe="fat")


def test_mistakes_raise_the_public_error(tmp_path):
    with pytest.raises(CnnftError, match="no such folder"):
        finetune(tmp_path / "absent", backbone="builtin")
    with pytest.raises(AttributeError):
        _ = cnnft.nonsense


def test_a_config_survives_its_dictionary(tmp_path):
    config = Config.of(tmp_path, epochs=3, lr=0.1, name="x", force=True)
    values = config.to_dict()
    assert "force" not in values and "head_lr" not in values
    again = Config.from_dict(values, "test")
    assert again.to_dict() == values and again.training.epochs == 3 and not again.run.force
