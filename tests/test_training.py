"""What a step does when the loss is not finite or memory runs out, and what a run does about it."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import draw_folder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cnnft import Config
from cnnft.config.choices import Precision
from cnnft.config.texts import parse_interval
from cnnft.data.sampler import KeyedBatches
from cnnft.errors import UsageError
from cnnft.runs.run import Run
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.state import TrainState
from cnnft.training.step import EpochDone, NonFiniteLossError, StepDone, train

IMAGES, BATCH = 12, 6
NEVER = float("inf")
SUM = partial(cross_entropy, reduction="sum")


class Small(nn.Module):
    """With a normalisation that a bad batch would poison; `fits`: images before memory runs out."""

    def __init__(self, fits: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        self.fc = nn.Linear(4 * 6 * 6, 3)
        self.fits, self.seen = fits, []

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError
        self.seen.append(len(pixels))
        return self.fc(self.layers(pixels))


def state(network: nn.Module, **more: object) -> TrainState:
    optimizer = torch.optim.SGD(
        [{"params": list(network.parameters()), "lr": 0.1, "initial_lr": 0.1, "name": "head"}]
    )
    return TrainState(
        network, optimizer, lambda step: 1.0, KeyedBatches(IMAGES, BATCH, 0, 2), **more
    )


def batches(bad: int | None = None) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    made = [(torch.randn(BATCH, 3, 8, 8), torch.arange(BATCH) % 3) for _ in range(4)]
    if bad is not None:
        made[bad][0][2] = float("nan")
    return made


def test_a_step_asks_no_device_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch):
    """`torch.manual_seed` does, and notes the stack for each: longer than a small network takes."""
    given, found = batches(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("it was seeded"))
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, 3))
    for before in (3, 4):  # the caller's generator neither counts nor changes
        torch.default_generator.manual_seed(before)
        expected = torch.default_generator.get_state()
        found.append([e.loss for e in train(state(copy.deepcopy(network)), given, SUM)
                      if isinstance(e, StepDone)])  # fmt: skip
        assert torch.equal(torch.default_generator.get_state(), expected)
    assert found[0] == found[1] and found[0][0] != found[0][1]


def weights(network: nn.Module) -> Tensor:
    return torch.cat([t.double().flatten() for t in network.state_dict().values()])


@pytest.mark.parametrize("frozen_statistics", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_add_up_to_those_of_the_whole_batch(micro_batch: int, frozen_statistics: bool):
    networks = Small(), Small()
    for network, size in zip(networks, (None, micro_batch), strict=True):
        kept = [network.layers[1]] if frozen_statistics else []
        list(train(state(network, micro_batch=size, keep_statistics=kept), batches(), SUM))
    assert networks[1].seen[: -(-BATCH // micro_batch)] == (
        [3, 3] if micro_batch == 4 else [micro_batch] * (BATCH // micro_batch)  # equal parts
    )
    close = torch.allclose(*map(weights, networks), rtol=0, atol=1e-6)
    assert close == frozen_statistics  # else BatchNorm sees other batches, as the docs say


def test_out_of_memory_halves_what_is_computed_at_once(caplog: pytest.LogCaptureFixture):
    tight, roomy = Small(fits=2), Small()
    tight_state = state(tight, keep_statistics=[tight.layers[1]])
    list(train(tight_state, batches(), SUM))
    list(train(state(roomy, keep_statistics=[roomy.layers[1]]), batches(), SUM))
    assert tight_state.micro_batch == 2 and set(tight.seen) == {2}
    assert torch.allclose(weights(tight), weights(roomy), rtol=0, atol=1e-6)
    assert "3 images are computed at once" in caplog.text and "BatchNorm" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        list(train(state(Small(fits=0)), batches(), SUM))


def test_a_step_computed_again_updates_running_statistics_once():
    """The first half of the batch was computed before memory ran out in the second."""

    class RunsOutOnce(Small):
        def forward(self, pixels: Tensor) -> Tensor:
            logits = super().forward(pixels)
            if self.seen == [3, 3]:
                raise torch.OutOfMemoryError
            return logits

    once, expected = RunsOutOnce(), Small()
    list(train(state(once, micro_batch=3), batches()[:1], SUM))
    list(train(state(expected, micro_batch=2), batches()[:1], SUM))
    assert once.seen == [3, 3, 2, 2, 2]
    assert torch.equal(weights(once), weights(expected))


def test_the_train_loss_is_plain_cross_entropy_and_the_objective_stands_beside_it():
    def doubled(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * SUM(logits, labels)

    def epochs(objective: Callable[[Tensor, Tensor], Tensor]) -> list[EpochDone]:
        of = state(Small())
        of.optimizer.param_groups[0]["initial_lr"] = 0.0
        return [e for e in train(of, batches(), objective) if isinstance(e, EpochDone)]

    for plain, weighted in zip(epochs(SUM), epochs(doubled), strict=True):
        assert plain.loss == weighted.loss == pytest.approx(plain.objective)
        assert weighted.objective == pytest.approx(2 * plain.loss)


def test_a_loss_that_is_not_finite_stops_before_the_step_is_taken():
    network = Small()
    events = train(state(network), batches(bad=1), SUM)
    assert isinstance(next(events), StepDone)
    before = network.fc.weight.clone()
    with pytest.raises(NonFiniteLossError, match=r"step 2 is nan, at learning rate 0\.1") as caught:
        next(events)
    assert caught.value.step == 1 and torch.equal(network.fc.weight, before)


def test_tolerated_steps_are_left_out_as_if_they_were_not_there():
    one, other = Small(), Small()
    of_one = state(one, max_skipped_steps=1)
    events = list(train(of_one, batches(bad=1), SUM))
    with_gap = [batch for i, batch in enumerate(batches()) if i != 1]
    list(train(state(other), with_gap, SUM))
    assert torch.equal(weights(one), weights(other)) and of_one.skipped_steps == 1
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert len(epochs) == 2 and 0 <= epochs[0].accuracy <= 1  # of the images that counted
    with pytest.raises(NonFiniteLossError):
        bad = batches(bad=1)
        bad[3] = bad[1]
        list(train(state(Small(), max_skipped_steps=1), bad, SUM))


def test_a_state_that_is_not_finite_is_not_saved():
    network = Small()
    broken = state(network)
    next(train(broken, batches(), SUM))
    broken.state_dict()
    with torch.no_grad():
        network.fc.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError):
        broken.state_dict()


# ---------------------------------------------------------------- the run around it


def settings(flat: Path, tmp_path: Path, **more: object) -> Config:
    values = {"epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu", "name": "run"}
    values |= {"mode": "finetune"} | more
    return Config.of(flat, backbone="builtin", runs_dir=tmp_path / "runs", image_size=32, **values)


def test_divergence_names_the_step_the_files_and_the_way_out(cnnft, flat: Path, tmp_path: Path):
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--lr=1e30", "--head-lr=1e30", "--workers=0",
        "--epochs=3", "--device=cpu", "--runs-dir", tmp_path, "--name=run", "--batch-size=4",
        "--no-probe-first", "--checkpoint-every=1",
    )  # fmt: skip
    outcome.fails_with(1, "the loss of step", "learning rate", ".png", "lower --lr", "--skip-non")
    assert all(
        tensor.isfinite().all()
        for tensor in (Run(tmp_path / "run").load_checkpoint() or pytest.fail()).tensors.values()
        if tensor.is_floating_point()
    )


@pytest.mark.parametrize(("images", "expected"), [(8, 8), (60, 8), (250, 16)])
def test_batch_size_auto_takes_ten_steps_but_no_batch_too_small_for_batchnorm(
    flat: Path, tmp_path: Path, images: int, expected: int
):
    """Of 8 training images one batch; of 48 batches of 8, though ten steps would want 4."""
    shutil.rmtree(flat)
    draw_folder(flat, ("ants", "bees"), images // 2 + 1)
    plan = prepare(settings(flat, tmp_path, batch_size="auto", val_fraction=0.2))
    assert plan.batches.batch_size == plan.config.training.batch_size == expected
    assert not plan.freezes_statistics


def test_the_rule_counts_the_images_that_a_step_holds(flat: Path, tmp_path: Path):
    """16 training images in a batch of 256 are 16, not 256."""
    plans = [prepare(settings(flat, tmp_path, batch_size=size)) for size in (16, 256)]
    assert plans[0].rates == plans[1].rates
    assert plans[1].rates.backbone == pytest.approx(0.1 * 16 / 256 / 10)


def test_a_frozen_backbone_has_no_learning_rate(flat: Path, tmp_path: Path):
    plan = prepare(settings(flat, tmp_path, train_stages=0))
    assert plan.rates.backbone == 0 and "backbone: frozen" in plan.rates.derivation


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", (90, NEVER)), ("5m", (300, NEVER)), ("0.5h", (1800, NEVER)), ("500", (NEVER, 500))],
)
def test_intervals(text: str, expected: tuple[float, float]):
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "m", "0", "-1s", "nan", "infm", "5 minutes", "1.5"])
def test_intervals_that_are_none(text: str):
    with pytest.raises(UsageError, match="--checkpoint-every"):
        parse_interval(text)


def test_checkpoints_come_every_so_many_steps(flat: Path, tmp_path: Path, monkeypatch):
    saved: list[int] = []
    monkeypatch.setattr(
        Run, "save_checkpoint", lambda run, checkpoint: saved.append(checkpoint.step)
    )
    list(run_plan(prepare(settings(flat, tmp_path, checkpoint_every="3", epochs=3))))
    assert saved == [3, 4, 7, 8, 11, 12]


def test_a_run_has_one_trainer(cnnft, flat: Path, tmp_path: Path):
    events = run_plan(prepare(settings(flat, tmp_path)))
    list(itertools.islice(events, 3))
    run = tmp_path / "runs" / "run"
    cnnft("finetune", "--resume", run).fails_with(1, "is being trained by another process")
    again = ["finetune", flat, "--backbone=builtin", "--runs-dir", run.parent, "--name=run"]
    cnnft(*again, "--force").fails_with(1, "is being trained by another process")
    events.close()
    assert cnnft("finetune", "--resume", run).code == 0


def test_force_keeps_the_old_run_until_the_new_one_has_weights(flat: Path, tmp_path: Path):
    list(run_plan(prepare(settings(flat, tmp_path, probe_first=False))))
    runs = tmp_path / "runs"
    old = (runs / "run" / "model.safetensors").read_bytes()
    for _ in range(2):  # dies twice before its first epoch is over
        events = run_plan(prepare(settings(flat, tmp_path, probe_first=False, force=True, seed=1)))
        list(itertools.islice(events, 2))
        events.close()
        assert (runs / ".run.replaced" / "model.safetensors").read_bytes() == old
    list(run_plan(prepare(settings(flat, tmp_path, probe_first=False, force=True, seed=1))))
    assert [path.name for path in runs.iterdir()] == ["run"]
    assert (runs / "run" / "model.safetensors").read_bytes() != old


def test_where_an_error_ends_training_the_way_on_is_told(cnnft, flat, tmp_path, monkeypatch):
    take, steps = torch.optim.SGD.step, []

    def step(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 6:  # in the second epoch
            shutil.rmtree(flat / "ants")
        return take(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--workers=0", "--epochs=3", "--device=cpu",
        "--runs-dir", tmp_path, "--name=run", "--batch-size=4", "--image-size=32", "--cache=off",
        "--mode=finetune",
    )  # fmt: skip
    outcome.fails_with(1, "the data changed while training")
    assert f"go on with: cnnft finetune --resume {tmp_path / 'run'}" in outcome.err


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_are_for_computing_alone(precision: Precision):
    networks = Small(), Small()
    kinds = (state(networks[0]), state(networks[1], precision=precision))
    losses = [
        [e.loss.item() for e in train(kind, batches(), SUM) if isinstance(e, StepDone)]
        for kind in kinds
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert weights(networks[0]).tolist() == pytest.approx(weights(networks[1]).tolist(), abs=0.05)
    tensors, _ = kinds[1].state_dict()
    assert {t.dtype for t in tensors.values() if t.dim() > 1} == {torch.float32}


def test_a_gradient_too_large_for_float16_leaves_out_the_step_and_halves_the_scale():
    network = Small()
    of = state(network, precision="float16", max_skipped_steps=1)
    of.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    events = train(of, batches(), SUM)
    before = network.fc.weight.clone()
    next(events)
    assert torch.equal(network.fc.weight, before) and of.scaler.get_scale() == 2.0**39
    assert of.skipped_steps == 0  # its loss was finite


def test_a_loss_that_is_not_finite_is_noticed_in_float16_too():
    of = state(Small(), precision="float16", max_skipped_steps=1)
    list(train(of, batches(bad=1), SUM))
    assert of.skipped_steps == 1
    with pytest.raises(NonFiniteLossError):
        list(train(state(Small(), precision="float16"), batches(bad=1), SUM))


def test_the_scale_belongs_to_the_state():
    whole, first, second = Small(), Small(), Small()
    of_whole, of_first = (state(n, precision="float16") for n in (whole, first))
    for of in (of_whole, of_first):
        of.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    list(train(of_whole, batches(), SUM))
    events = train(of_first, batches(), SUM)
    assert [type(next(events)) for _ in range(2)] == [StepDone] * 2
    tensors, values = of_first.state_dict()
    resumed = state(second, precision="float16")
    resumed.scaler = torch.amp.GradScaler("cpu", init_scale=7.0, growth_interval=1)
    resumed.restore(tensors, json.loads(json.dumps(values)))
    assert resumed.scaler.get_scale() == 8.0
    list(train(resumed, batches()[2:], SUM))
    assert torch.equal(weights(whole), weights(second))
    assert resumed.scaler.get_scale() == of_whole.scaler.get_scale()
    other = state(Small())  # it may go on in another precision
    other.restore(tensors, values)


def test_the_precision_is_settled_and_told(cnnft, flat: Path, tmp_path: Path):
    settled = prepare(settings(flat, tmp_path)).config
    assert settled.machine.precision == "float32"
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--workers=0", "--epochs=1", "--device=cpu",
        "--precision=bfloat16", "--runs-dir", tmp_path, "--name=half", "--image-size=32",
        "--mode=finetune",
    )  # fmt: skip
    assert outcome.code == 0 and "on cpu, bfloat16" in outcome.err
    assert Run(tmp_path / "half").config().machine.precision == "bfloat16"
    resumed = cnnft("finetune", "--resume", tmp_path / "half", "--epochs=2")
    assert resumed.code == 0 and "on cpu, bfloat16" in resumed.err
