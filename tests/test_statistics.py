"""BatchNorm's running statistics belong to the weights that they are used with."""

from pathlib import Path

import pytest
import torch
from conftest import draw_folder
from PIL import Image

from cnnft import Config, load
from cnnft.config.recipes import expand
from cnnft.data.loading import Loading, TrainingBatches
from cnnft.models.freezing import learning_statistics
from cnnft.runs.run import Run
from cnnft.training.averaging import recalibrate
from cnnft.training.feed import Feed
from cnnft.training.finetune import run_plan
from cnnft.training.plan import Plan, prepare


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images much brighter, and of less contrast, than those of the pretraining."""
    data = tmp_path_factory.mktemp("shifted") / "data"
    draw_folder(data / "train", ("ants", "bees"), 40)
    draw_folder(data / "val", ("ants", "bees"), 50, first_seed=100)
    for path in data.glob("*/*/*.png"):
        Image.eval(Image.open(path), lambda value: 190 + value // 4).save(path)
    return data


def train(data: Path, folder: Path, momentum: float, **more: object) -> tuple[Plan, Run]:
    """Ten steps."""
    config = Config.of(
        data, backbone="builtin", epochs=2, batch_size=16, workers=0, device="cpu", lr=0.003,
        runs_dir=folder, name="run", force=True, **{"probe_first": False} | more,
    )  # fmt: skip
    plan = prepare(config)
    for module in plan.classifier.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
    list(run_plan(plan))
    return plan, Run.open(folder / "run")


def accuracy(model, run: Run) -> float:
    val = run.predictions().samples
    found = [answer.label for answer in model.predict(val.paths, workers=0)]
    return sum(map(str.__eq__, found, (val.classes[label] for label in val.labels))) / len(val)


@pytest.mark.parametrize("momentum", [0.001, 0.1])
@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"ema": 0.9}, marks=pytest.mark.slow),
        pytest.param({"mode": "bn-only"}, marks=pytest.mark.slow),
    ],
    ids=["", "ema", "bn-only"],
)
def test_statistics_fit_after_ten_steps(shifted, tmp_path, momentum, more):
    plan, run = train(shifted, tmp_path, momentum, **more)
    kept, again = load(run.path, device="cpu"), load(run.path, device="cpu")
    names = learning_statistics(plan.classifier.network)
    assert names
    keys = [plan.batches.part(step) for step in range(plan.batches.steps_per_epoch)]
    whole = TrainingBatches(Feed(plan).dataset, keys, Loading(16, 0))
    layers = [again.network.get_submodule(name) for name in names]
    recalibrate(again.network, layers, (pixels for pixels, _ in whole))
    assert abs(accuracy(kept, run) - accuracy(again, run)) <= 0.01
    for name, layer in zip(names, layers, strict=True):
        found = kept.network.get_submodule(name)
        torch.testing.assert_close(found.running_mean, layer.running_mean, rtol=1e-3, atol=1e-4)


def test_the_tutorials_statistics_are_torchs(shifted, tmp_path):
    assert expand({"data": "-", "recipe": "tutorial"})["recalibrate_bn"] is False
    plan, run = train(shifted, tmp_path, 0.001, recalibrate_bn=False)
    networks = load(run.path, device="cpu").network, prepare(plan.config).classifier.network
    for name in learning_statistics(plan.classifier.network):
        after, before = (int(n.get_submodule(name).num_batches_tracked) for n in networks)
        assert after - before == 5 * run.metrics().best_epoch
