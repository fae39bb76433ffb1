"""What a run holds: typed records that read back what was written, of this cnnft and of others."""

import errno
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_alike, draw_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cnnft import CnnftError, Config, load
from cnnft.data.dataset import Samples, Skipped
from cnnft.inference.predictions import Predictions
from cnnft.metrics import Score
from cnnft.runs.formats import FORMATS
from cnnft.runs.predictions import predictions_from_csv, predictions_to_csv
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.runs.scores import Evidence, Metrics, TrainScore
from cnnft.runs.weights import has_scores, save_weights, weights_hash
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]
OLD = Path(__file__).parent / "old"
RUNS = ("feature-extractor", "finetune")
NAMES = ("file", "role", "a, b", 'a "quoted" one', "two\nlines", "a\rreturn", "logit:x", " ünï")


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained, tmp_path / "copied")))


def samples(n: int, classes: tuple[str, ...] = NAMES, **more: Any) -> Samples:
    return Samples(
        paths=tuple(f"/data/{classes[i % len(classes)]}/{i}.png" for i in range(n)),
        labels=tuple(i % len(classes) for i in range(n)),
        classes=classes,
        hashes=tuple(f"{i:064x}" for i in range(n)),
        **more,
    )


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ---------------------------------------------------------------- records


def test_every_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    history = [
        Epoch(n, 0.1 / 3, 0.1, 1 / 3, 0.5, 0.75, 2 / 3, 0.5, 0.25, 0.2, 12.5, n == 1)
        for n in (1, 2)
    ]
    run.save_history(history, steps_per_epoch=7)
    assert run.history() == history
    val = Score(n=8, correct=6, macro_recall=0.7, loss=1 / 3)
    for evidence in reversed(Evidence):
        metrics = Metrics("best epoch 1", 1, TrainScore(16, 1 / 3, 0.75), val, evidence)
        run.save_metrics(metrics)
        assert run.metrics() == metrics
    run.save_environment({"torch": "2.9"})
    assert run.environment() == {"torch": "2.9"}
    train, skipped = samples(16), (Skipped("/data/a\rb.png", "is damaged, quite"),)
    run.save_data(train, samples(8), skipped)
    assert dict(run.dataset().splits) == {"train": train, "val": samples(8)}
    assert run.dataset().skipped == skipped
    config = Config.of("/data", epochs=3, lr=0.1, teacher=("a", "b"))
    run.save_config(config)
    assert run.config() == config


def test_what_is_not_there_is_none_or_a_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert (run.environment(), run.predictions(), run.skipped()) == (None, None, ())
    for read in (run.history, run.metrics, run.dataset, run.description):
        with pytest.raises(CnnftError, match="cannot be read"):
            read()


def test_groups_and_weights_are_kept(tmp_path: Path) -> None:
    train = samples(16, groups=("p, 1", "", *"abcdefghijklmn"), weights=(1 / 3, *range(15)))
    run, val = Run(tmp_path), samples(8)
    run.save_data(train, val, ())
    run.save_metrics(Metrics("", 1, TrainScore(16, 0.0, 0.0), Score(8, 0, 0, 0)))
    found = run.dataset()
    assert found.train == train
    assert found.val == val and found.val.groups == found.val.weights == ()
    header = (tmp_path / "data.csv").read_text().splitlines()[0]
    assert header == "split,class,file,sha256,group,weight"
    run.require_same_data(train, val)
    for changed in ({"weights": (1.0,) * 16}, {"groups": ()}):
        with pytest.raises(CnnftError, match="cannot go on"):
            run.require_same_data(replace(train, **changed), val)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("data.csv", "train,", "some,"), ("data.csv", ",sha256", ",md5"),
     ("data.csv", ",,\n", ",,x\n"), ("metrics.json", '"n": 16', '"n": "16"'),
     ("metrics.jsonl", '"best": true', '"best": 1'), ("metrics.jsonl", "{", "["),
     ("predictions.csv", "val,", "test-time,"), ("predictions.csv", "logit:bees", "logit:ants"),
     ("predictions.csv", "logit:bees", "logit:wasps"), ("predictions.csv", "sha256", "hash"),
     ("environment.json", '"cpu"', "3"), ("formats.json", '"formats"', '"format"'),
     ("formats.json", ": 1", ": null")],
)  # fmt: skip
def test_a_damaged_file_is_named(copied: Run, name: str, before: str, after: str) -> None:
    path = copied.path / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(CnnftError, match=f"{name} is damaged"):
        (copied.history(), copied.metrics(), copied.predictions(), copied.environment())


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("folds", [(), tuple(n % 3 for n in range(64))])
def test_predictions_read_back_bit_for_bit(folds: tuple[int, ...]) -> None:
    """Class names are any folder's; logits are of every size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, len(NAMES), generator=generator)
    logits *= 10.0 ** torch.randint(-42, 38, logits.shape, generator=generator)
    logits[0, 0], logits[0, 1] = 0.0, -torch.inf
    kept = Predictions(samples(64), logits, "out-of-fold" if folds else "val", folds)
    found = predictions_from_csv(io.BytesIO(predictions_to_csv(kept)))
    assert (found.samples, found.role, found.folds) == (kept.samples, kept.role, kept.folds)
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits.view(torch.int32), kept.logits.view(torch.int32))


@pytest.mark.parametrize("damage", [
    lambda t: "", lambda t: t.splitlines()[0], lambda t: t[:-2],
    lambda t: t.replace("val,", ",", 1),
    lambda t: t.replace("file,", "place,"), lambda t: t + t, lambda t: t.replace(",1\n", ",one\n"),
    lambda t: t.replace(",1\n", ",nan\n"), lambda t: t.replace("val,", "val,second"),
    lambda t: t.replace(",b,0", ",c,0"),
])  # fmt: skip
def test_a_damaged_table_of_predictions_is_refused(damage: Callable[[str], str]) -> None:
    table = predictions_to_csv(Predictions(samples(2, ("a", "b")), torch.eye(2), "val")).decode()
    assert predictions_from_csv(io.BytesIO(table.encode())).predicted.tolist() == [0, 1]
    with pytest.raises(ValueError):
        predictions_from_csv(io.BytesIO(damage(table).encode()))


def test_the_table_is_what_evaluate_says_of_the_images(
    cnnft: Cli, finetuned: Path, trained: Path
) -> None:
    for run in (finetuned, trained):
        kept = Run.open(run).predictions()
        evaluated = ("evaluate", trained.parents[1] / "data", "-m", run, "--json", "--workers", 0)
        found = json.loads(cnnft(*evaluated).out)
        assert kept.score().loss == pytest.approx(found["loss"], abs=1e-5)
        assert (kept.score().n, kept.score().correct) == (found["n"], found["correct"])
        for file, answer in zip(kept.samples.paths, kept.log_probs.exp(), strict=True):
            [said] = load(run, device="cpu").predict(file)
            assert dict(said.top) == pytest.approx(
                dict(zip(kept.samples.classes, answer.tolist(), strict=True)), abs=1e-5
            )


# ---------------------------------------------------------------- of another cnnft


def test_every_file_has_a_version(trained: Path) -> None:
    formats = json.loads((trained / "formats.json").read_text())["formats"]
    within = {"formats.json", "config.json", "model.safetensors"}  # which is config.json's
    assert {path.name for path in trained.iterdir()} - within <= formats.keys()
    assert formats == FORMATS


@pytest.mark.parametrize("name", ["config.toml", "data.csv", "predictions.csv", "state"])
def test_a_newer_format_is_refused_in_a_sentence(cnnft: Cli, copied: Run, name: str) -> None:
    edit_json(
        copied.path / "formats.json",
        lambda kept: (kept.update(cnnft="9.1"), kept["formats"].update({name: 99})),
    )
    command = {
        "config.toml": ("finetune", "--resume", copied.path),
        "data.csv": ("evaluate", copied.path, "-m", copied.path),
        "predictions.csv": ("diff", copied.path, copied.path),
        "state": ("finetune", "--resume", copied.path),
    }[name]
    if name == "data.csv":
        command = ("evaluate", Path(copied.config().dataset.data), "-m", copied.path)
    cnnft(*command).fails_with(1, name, "was written by cnnft 9.1: update cnnft")


def test_what_is_unknown_is_ignored(cnnft: Cli, trained: Path, copied: Run) -> None:
    """In every file, where the version is the same; a file of --config may not have it."""
    data = trained.parents[1] / "data"
    expected = cnnft("predict", data, "-m", trained, "--json").out
    path = copied.path

    def describe(values: Any) -> None:
        own = values["cnnft"]
        for part in (own, own["input_spec"], own["backbone"], own["weights_file"]):
            part["new"] = {"x": 1}

    edit_json(path / "config.json", describe)
    for name in ("metrics.json", "formats.json", "environment.json"):
        edit_json(path / name, lambda values: values.update(new="1"))
    edit_json(path / "metrics.json", lambda values: values["val"].update(new=[1]))
    rows = [json.loads(line) | {"new": 1} for line in (path / "metrics.jsonl").open()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("data.csv", "predictions.csv"):
        first, *others = (path / name).read_text().splitlines()
        lines = [f"{first},new", *(f"{line},1" for line in others)]
        (path / name).write_text("\n".join(lines) + "\n")
    with (path / "config.toml").open("a") as file:
        file.write("new = 1\n")

    before = Run.open(trained)
    assert copied.config() == before.config() and copied.history() == before.history()
    assert copied.metrics() == before.metrics() and copied.description() == before.description()
    assert copied.dataset().splits == before.dataset().splits
    assert torch.equal(copied.predictions().logits, before.predictions().logits)
    assert cnnft("predict", data, "-m", path, "--json").out == expected
    assert cnnft("finetune", "--resume", path).code == 0
    with (path / "config.toml").open("a") as file:
        file.write("new = 1\n")
    cnnft("finetune", "--config", path / "config.toml").fails_with(2, "unknown setting 'new'")


def test_an_exported_file_may_say_more(cnnft: Cli, trained: Path, tmp_path: Path) -> None:
    data, file = trained.parents[1] / "data", tmp_path / "head.safetensors"
    assert cnnft("export", trained, "--format", "head", "--output", file).code == 0
    expected = cnnft("predict", data, "-m", file, "--json").out
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["cnnft"])
    for part in (described["cnnft"], *(described["cnnft"][k] for k in ("input_spec", "backbone"))):
        part["new"] = 1
    save_file(load_file(file), file, {"cnnft": json.dumps(described)})
    assert cnnft("predict", data, "-m", file, "--json").out == expected


# ---------------------------------------------------------------- before formats had versions


@pytest.fixture
def old(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run that cnnft made before it had packages; its backbone's folder is gone."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(OLD / name, tmp_path / name))

    return copy


def same_answers(found: str, expected: Path) -> None:
    for now, then in zip(json.loads(found), json.loads(expected.read_text()), strict=True):
        assert Path(now["file"]).parts[-2:] == Path(then["file"]).parts[-2:]
        assert [top["class"] for top in now["top"]] == [top["class"] for top in then["top"]]
        probabilities = [top["probability"] for top in then["top"]]
        # Not closer: BatchNorm is folded for few files too since then, which rounds otherwise.
        assert [top["probability"] for top in now["top"]] == pytest.approx(probabilities, abs=1e-5)


PREDICT = ("predict", OLD / "data", "--top", 2, "--json", "--workers", 0, "--device", "cpu")


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_answers_as_it_did(cnnft: Cli, old: Callable[[str], Path], name: str) -> None:
    run = old(name)
    same_answers(cnnft(*PREDICT, "-m", run).out, OLD / f"{name}.predict.json")
    arguments = ("--json", "--workers", 0, "--device", "cpu")
    found = json.loads(cnnft("evaluate", OLD / "data", "-m", run, *arguments).out)
    expected = json.loads((OLD / f"{name}.evaluate.json").read_text())
    numbers = {key for key, value in expected.items() if isinstance(value, float)}
    for key in numbers:
        assert found[key] == pytest.approx(expected[key], abs=1e-5)
    rest = expected.keys() - numbers  # later versions say more
    assert {key: found[key] for key in rest} == {key: expected[key] for key in rest}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("form", ["head", "safetensors", "onnx"])
def test_an_old_run_exports_what_answers_as_it_did(
    cnnft: Cli, old: Callable[[str], Path], name: str, form: str, tmp_path: Path
) -> None:
    run, file = old(name), tmp_path / f"file.{form}"
    if form == "onnx":
        ort = pytest.importorskip("onnxruntime")
        text = (run / "data.csv").read_text()
        (run / "data.csv").write_text(text.replace("/tmp/cnnft-old/data", str(OLD / "data")))
    outcome = cnnft("export", run, "--format", form, "--output", file)
    if (name, form) == ("finetune", "head"):
        return outcome.fails_with(2, "trained its backbone too")
    assert outcome.code == 0, outcome.err
    if form != "onnx":
        weights = ("--weights", OLD / "backbone.safetensors") if form == "head" else ()
        return same_answers(cnnft(*PREDICT, "-m", file, *weights).out, OLD / f"{name}.predict.json")
    model, session = load(run, device="cpu"), ort.InferenceSession(file)
    for path in sorted((OLD / "data").glob("*/*.png")):
        from cnnft.data.images import read_image

        pixels = model.preprocess(read_image(path))[None]
        (logits,) = session.run(None, {"pixels": pixels.numpy()})
        assert torch.from_numpy(logits) == pytest.approx(model.forward(pixels).detach(), abs=1e-4)


def test_an_old_head_file_answers_as_it_did(cnnft: Cli) -> None:
    head = OLD / "head.safetensors"
    outcome = cnnft(*PREDICT, "-m", head, "--weights", OLD / "backbone.safetensors")
    same_answers(outcome.out, OLD / "feature-extractor.predict.json")
    cnnft(*PREDICT, "-m", head).fails_with(1, "not there any more", "--weights FILE")


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_read(cnnft: Cli, old: Callable[[str], Path], name: str) -> None:
    run = Run.open(old(name))
    epochs = run.history()
    assert len(epochs) == run.config().training.epochs
    assert epochs[0].train_objective == epochs[0].train_loss > 0
    assert run.metrics().val.n == len(run.dataset().val) == 4
    assert run.description().classes == run.dataset().classes == ("ants", "bees, wasps")
    assert run.environment()["cnnft"] == "0.1.0" and run.predictions() is None
    outcome = cnnft("diff", run.path, OLD / ("finetune" if name != "finetune" else RUNS[0]))
    assert outcome.code == 0 and "made before runs kept them" in outcome.out


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_not_resumed(cnnft: Cli, old: Callable[[str], Path], name: str) -> None:
    run = old(name)
    cnnft("finetune", "--resume", run, "--epochs", 20).fails_with(
        1, f"{run} was begun by an older cnnft", "start a new run"
    )


# ---------------------------------------------------------------- the folder of a model alone


def test_a_model_folder_is_evaluated_and_exported(
    cnnft: Cli, trained: Path, tmp_path: Path
) -> None:
    """`predict` opens it, so the others do; it does not say what it was trained on."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, folder)
    unseen = draw_folder(tmp_path / "unseen", ("ants", "bees"), 3, first_seed=700)
    outcome = cnnft("evaluate", unseen, "-m", folder, "--json")
    assert "does not say what it was trained on" in outcome.err
    expected = json.loads(cnnft("evaluate", unseen, "-m", trained, "--json").out)
    unknown = {"left_out": None, "selected_on_val": None}
    assert json.loads(outcome.out) == expected | unknown
    for form in ("head", "safetensors"):
        assert cnnft("export", folder, "--format", form).code == 0
        file = next(folder.glob(f"alone.{'head.' if form == 'head' else ''}safetensors*"))
        said, expected = (cnnft("predict", unseen, "-m", m, "--json").out for m in (file, trained))
        assert_alike(json.loads(said), json.loads(expected))


# ---------------------------------------------------------------- weights and checkpoint


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.mark.parametrize("place", ["save_predictions", "save_history", "save_checkpoint"])
def test_weights_and_scores_are_of_one_epoch_after_a_kill(
    flat: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the better weights of epoch 2 are written and its checkpoint is not; resumed on
    other hardware, where that epoch comes out no better than the one before."""
    config = Config.of(
        flat, backbone="builtin", epochs=3, batch_size=4, workers=0, device="cpu", lr=0.01,
        head_lr=0.1, probe_first=False, runs_dir=tmp_path, name="run",
    )  # fmt: skip
    save, calls = getattr(Run, place), []

    def dying(self: Run, *arguments: object) -> None:
        calls.append(place)
        if len(calls) == 2:
            raise Killed
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, place, dying)
        patch.setattr("cnnft.training.session.lowest_loss", lambda *before: math.inf)
        with pytest.raises(Killed):
            list(run_plan(prepare(config)))
    run = Run.open(tmp_path / "run")
    assert len(run.load_checkpoint().values["history"]) == 1
    monkeypatch.setattr("cnnft.training.session.lowest_loss", lambda *before: 0.0)
    list(run_plan(prepare(config, run), run))

    assert [epoch.best for epoch in run.history()] == [True, True, False]
    kept, metrics, model = run.predictions(), run.metrics(), load(run.path, device="cpu")
    assert metrics.best_epoch == 2
    assert metrics.val.loss == pytest.approx(kept.score().loss, abs=1e-6)
    answers = model.predict(kept.samples.paths)
    for answer, probabilities in zip(answers, kept.log_probs.exp(), strict=True):
        expected = dict(zip(model.classes, probabilities.tolist(), strict=True))
        assert dict(answer.top) == pytest.approx(expected, abs=1e-5)


def test_a_setting_of_another_type_names_the_file(cnnft, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "config.toml"
    file.write_text(file.read_text().replace("epochs = 2", 'epochs = "two"'))
    cnnft("diff", run, trained).fails_with(1, str(file), "is damaged", "'two'")


def test_other_weights_for_a_head_file_are_refused_with_the_way_out(cnnft, trained, tmp_path):
    head = tmp_path / "head.safetensors"
    assert cnnft("export", trained, "--format", "head", "--output", head).code == 0
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    image = next(trained.parents[1].glob("data/*/*.png"))
    refused = cnnft("predict", image, "-m", head, "--weights", other)
    refused.fails_with(1, str(head), "trained on builtin", "leave out --weights")


def test_a_model_that_is_replaced_takes_its_scores_with_it(
    copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any of the writes leaves the old weights and scores, or weights without any."""
    before = weights_hash(copied.path)

    def stop(self: Path, target: Path) -> None:
        assert target.name == "model.safetensors"
        assert not has_scores(copied.path)  # before the new weights are there
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_weights(copied.path, b"others")
    assert weights_hash(copied.path) == before and not copied.is_of(before)


def test_a_full_disk_leaves_the_scores_of_the_weights(
    copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnft.machine.files.os.fdopen", full_file)
    with pytest.raises(CnnftError, match="cannot be written"):
        save_weights(copied.path, b"others")
    assert copied.is_of(weights_hash(copied.path))


def full_file(handle: int, mode: str) -> object:
    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    return Full(handle, mode.removesuffix("b"))
