"""Distillation: teachers, and the soft targets that a student learns from."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import normalize

from cnnft.data.dataset import Samples
from cnnft.data.transforms import InputSpec, denormalize
from cnnft.errors import UsageError
from cnnft.inference.classifier import Classifier
from cnnft.inference.predict import Inference, collect, predict_files
from cnnft.inference.storage import load

SoftTargets = Callable[[Tensor, Sequence[int]], Tensor]
"""(a batch's pixels as the student sees them (B, 3, H, W), their indices in the training images) ->
the teachers' mean logits (B, C), in the student's order of classes."""


def load_teachers(
    paths: Sequence[str], classes: tuple[str, ...], device: str
) -> tuple[Classifier, ...]:
    """Raises `UsageError` where one has other classes than the data."""
    teachers = tuple(replace(load(path, device=device), temperature=1.0) for path in paths)
    for path, teacher in zip(paths, teachers, strict=True):
        if others := sorted(set(teacher.classes) ^ set(classes)):
            raise UsageError(
                f"--teacher {path} was trained on other classes than the data has ({others[0]} is "
                "not in both): a teacher must know the same"
            )
    return teachers


def make_soft_targets(
    teachers: Sequence[Classifier],
    spec: InputSpec,
    samples: Samples,
    inference: Inference,
    *,
    same_views: bool,
) -> SoftTargets:
    """With `same_views`, training images look the same in every epoch: teachers predict each once.

    Otherwise they see what the student sees, at their own size and normalisation (Beyer et al.,
    2022: a teacher is consistent if it judges the same view).
    """
    if not same_views:
        return lambda pixels, indices: _mean(
            [_logits(teacher, pixels, spec, samples.classes) for teacher in teachers]
        )
    cached = _mean(
        [
            collect(predict_files(teacher, samples.paths, inference), samples.paths)[
                :, _order(teacher, samples.classes)
            ]
            for teacher in teachers
        ]
    )
    return lambda pixels, indices: cached[list(indices)].to(pixels.device)


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack(logits).mean(dim=0)


def _order(teacher: Classifier, classes: tuple[str, ...]) -> list[int]:
    return [teacher.classes.index(name) for name in classes]


@torch.no_grad()
def _logits(
    teacher: Classifier, pixels: Tensor, spec: InputSpec, classes: tuple[str, ...]
) -> Tensor:
    """Of pixels that are normalised and sized as the student's `spec` has them."""
    own = teacher.input_spec
    image = denormalize(pixels, spec)
    if own.size != spec.size:
        image = interpolate(image, size=(own.size, own.size), mode="bilinear", antialias=True)
    return teacher.forward(normalize(image, own.mean, own.std))[:, _order(teacher, classes)]
