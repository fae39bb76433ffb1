"""How cost grows with the number of images and of classes: small generated JPEGs, cnnft alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.rows import Facts, Group, Row, Setting, cnnft, make_run
from benchmarks.synthetic import draw_images

SIZE = 64  # pixels: what grows with the images is meant, not what one image costs
CLASSES = (10, 100, 1000)
LEAST = 5  # images of a class, of which a fifth is held out


def growth(setting: Setting, sizes: tuple[int, ...]) -> list[Group]:
    """Training and prediction of ever more images; training of ever more classes."""
    middle = sizes[len(sizes) // 2]
    images = [_finetune(setting, n, CLASSES[0]) for n in sizes]
    classes = [_finetune(setting, middle, c) for c in CLASSES if c * LEAST <= middle]
    run = setting.work / "runs" / _name(sizes[0], CLASSES[0])
    train = partial(make_run, setting, run, images[0].command)
    predict = [_predict(setting, n, run, train) for n in sizes]
    return [
        Group("growth", "training, more images", images[0].name, tuple(images)),
        Group("growth", "training, more classes", classes[0].name, tuple(classes)),
        Group("growth", "predict, more images", predict[0].name, tuple(predict)),
    ]


def _name(images: int, classes: int) -> str:
    return f"{images}-images-{classes}-classes"


def _folder(setting: Setting, images: int, classes: int) -> tuple[Path, Callable[[], object]]:
    """Where the images are, and what draws them."""
    folder = setting.work / "growth" / _name(images, classes)

    def draw() -> None:
        setting.clear_cache()
        if not folder.exists():
            draw_images(folder, images, classes, (SIZE, SIZE))

    return folder, draw


def _finetune(setting: Setting, images: int, classes: int) -> Row:
    folder, draw = _folder(setting, images, classes)
    command = cnnft(
        *("finetune", str(folder), "--backbone", "builtin", "--mode", "feature-extractor"),
        *("--image-size", str(SIZE), "--epochs", "1", "--device", setting.device),
        *("--runs-dir", str(setting.work / "runs"), "--name", folder.name, "--force"),
        *("--json", "--quiet"),
    )
    return Row(f"{images:,} images, {classes:,} classes", command, _accuracy, draw)


def _predict(setting: Setting, images: int, run: Path, train: Callable[[], object]) -> Row:
    folder, draw = _folder(setting, images, CLASSES[0])

    def before() -> None:
        draw()
        train()

    command = cnnft(
        *("predict", str(folder), "-m", str(run), "--device", setting.device),
        *("--output", str(setting.work / "predicted.jsonl"), "--quiet"),
    )
    return Row(f"{images:,} images", command, lambda out: {}, before)


def _accuracy(out: str) -> Facts:
    return {"accuracy": json.loads(out)["val"]["accuracy"]}
