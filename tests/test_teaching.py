"""Distillation from the command line, and what teachers say."""

import shutil

import pytest
import torch

from cnnft import finetune, load
from cnnft.data.loading import Loading, view_batches
from cnnft.data.reading import read_dataset
from cnnft.data.transforms import EvaluationViews
from cnnft.inference.predict import Inference, predict
from cnnft.training.distillation import make_soft_targets

PLAIN = Inference(batch_size=8, workers=0)
SMALL = {"backbone": "builtin", "workers": 0, "batch_size": 6}


def seen(classifier, samples):
    views = EvaluationViews(classifier.input_spec)
    return torch.cat([b.pixels[:, 0] for b in view_batches(samples.paths, views, Loading(8, 0))])


@pytest.mark.parametrize("same_views", [True, False])
def test_teachers_judge_as_they_predict(trained, same_views):
    """Cached or asked at every step, where the student sees what they see."""
    samples = read_dataset(trained.parents[1] / "data").train
    teacher = load(trained, device="cpu")
    soft_targets = make_soft_targets(
        [teacher], teacher.input_spec, samples, PLAIN, same_views=same_views
    )
    found = soft_targets(seen(teacher, samples), range(len(samples)))
    expected = predict(teacher, samples, PLAIN, "val").log_probs
    torch.testing.assert_close(found.log_softmax(dim=1), expected, atol=1e-4, rtol=1e-4)


def test_several_teachers_are_averaged_and_their_classes_put_in_order(trained, finetuned):
    samples = read_dataset(trained.parents[1] / "data").train
    one, other = load(trained, device="cpu"), load(finetuned, device="cpu")
    pixels, images = seen(one, samples), range(len(samples))

    def say(*teachers):
        made = make_soft_targets(teachers, one.input_spec, samples, PLAIN, same_views=False)
        return made(pixels, images)

    torch.testing.assert_close(say(one, other), (say(one) + say(other)) / 2)
    before = say(one)
    layer = one.network.get_submodule(sorted(one.head)[0].rpartition(".")[0])
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
        layer.bias.copy_(layer.bias.flip(0))
    one.classes = one.classes[::-1]
    torch.testing.assert_close(say(one), before)


@pytest.mark.parametrize("augment", ["none", "basic"])
def test_a_student_of_another_size_comes_to_agree_with_its_teacher(trained, tmp_path, augment):
    data = trained.parents[1] / "data"
    run = finetune(
        data, image_size=64, teacher=[str(trained)], distill_weight=1.0, augment=augment,
        epochs=4, runs_dir=tmp_path, mode="feature-extractor", head_lr=0.1, **SMALL,
    )  # fmt: skip
    files = run.predictions().samples.paths
    student, teacher = (load(path, device="cpu").predict(files) for path in (run.path, trained))
    assert [p.label for p in student] == [p.label for p in teacher]
    assert run.config().loss.teacher == (str(trained),)


def test_bad_teachers_are_refused(cnnft, trained, separated, tmp_path):
    flags = ("--backbone", "builtin", "--workers", 0, "--runs-dir", tmp_path / "runs")
    refused = cnnft("finetune", separated, *flags, "--teacher", trained)
    refused.fails_with(2, str(trained), "other classes", "wasps")
    cnnft("finetune", separated, *flags, "--teacher", tmp_path / "no").fails_with(2, "no such run")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_that_knows_validation_images_is_told(cnnft, trained, tmp_path):
    data = trained.parents[1] / "data"
    flags = ("--backbone", "builtin", "--workers", 0, "--runs-dir", tmp_path, "--epochs", 1)
    outcome = cnnft("finetune", data, *flags, "--teacher", trained, "--split-seed", 1)
    assert outcome.code == 0 and "of the validation images" in outcome.err
    outcome = cnnft("finetune", data, *flags, "--teacher", trained)
    assert outcome.code == 0 and "of the validation images" not in outcome.err


def test_a_resumed_run_learns_from_the_same_teacher(cnnft, trained, finetuned, tmp_path):
    data, teacher = trained.parents[1] / "data", tmp_path / "teacher"
    shutil.copytree(trained, teacher)
    flags = ("--backbone", "builtin", "--workers", 0, "--image-size", 64, "--epochs", 1)
    flags += ("--runs-dir", tmp_path, "--name", "student")
    assert cnnft("finetune", data, *flags, "--teacher", teacher).code == 0
    assert cnnft("finetune", "--resume", tmp_path / "student").code == 0
    shutil.rmtree(teacher)
    shutil.copytree(finetuned, teacher)
    resumed = cnnft("finetune", "--resume", tmp_path / "student", "--epochs", 2)
    resumed.fails_with(1, "a teacher's weights are others", "start a new run")


@pytest.mark.parametrize("role", ["teacher", "backbone", "weights"])
def test_force_replaces_no_run_that_training_is_to_learn_from(cnnft, trained, tmp_path, role):
    data, run = trained.parents[1] / "data", tmp_path / "run"
    shutil.copytree(trained, run)
    given = {
        "teacher": ("--backbone", "builtin", "--teacher", run),
        "backbone": ("--backbone", f"local-dir:{run}"),
        "weights": ("--backbone", "resnet18", "--weights", run / "model.safetensors"),
    }[role]
    flags = ("--runs-dir", tmp_path, "--name", "run", "--force", "--workers", 0)
    cnnft("finetune", data, *flags, *given).fails_with(2, "--force", str(run), role, "--name")
    assert (run / "model.safetensors").exists()
