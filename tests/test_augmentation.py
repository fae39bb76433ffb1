"""What training does to images and batches: the same for the same key, whatever the image."""

import io
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Outcome, draw_folder
from oddities import cmyk, encoded, picture
from PIL import Image
from test_training import BATCH, SUM, Small, batches, state, weights
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from cnnft.config.pixels import AugmentationConfig
from cnnft.data.augmentation import (
    PRESETS,
    Augmentation,
    Lighting,
    augmentation,
    mixing,
    training_transform,
)
from cnnft.data.images import read_image
from cnnft.data.loading import Loading, TrainingBatches, TrainingImages
from cnnft.data.reading import read_dataset
from cnnft.data.sampler import IGNORED, KeyedBatches
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.training.step import EpochDone, train

Cli = Callable[..., Outcome]
SPEC = InputSpec(32, 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PARTS = {
    "hflip": True, "vflip": True, "crop_and_pad": 0.9, "rotation": 180, "translation": 1,
    "shear": 45, "perspective": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5,
    "sharpness": 4, "blur": 5, "noise": 0.1, "pca": 0.1, "erase": 1,
}  # fmt: skip
AUGMENTATIONS = PRESETS | {name: Augmentation(**{name: most}) for name, most in PARTS.items()}
GREY = Image.new("RGB", (40, 30), (128, 128, 128))


def seeded(transform: Callable[[Image.Image], Tensor], image: Image.Image, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return transform(image)


def test_basic_is_crop_and_flip_and_none_what_evaluation_sees() -> None:
    parts = [
        v2.RandomResizedCrop(32, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.PILToTensor(), lambda pixels: pixels / 255,
        v2.Normalize(SPEC.mean, SPEC.std),
    ]  # fmt: skip
    image = picture(size=(100, 60))
    for seed in range(10):
        expected = seeded(v2.Compose(parts), image, seed)
        assert torch.equal(seeded(training_transform(SPEC), image, seed), expected)
    for fit in ("crop", "squash", "pad"):
        spec = replace(SPEC, fit=fit)
        plain = training_transform(spec, PRESETS["none"])(image)
        assert torch.equal(plain, EvaluationViews(spec)(image)[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_part_does_something_and_the_seed_decides_what(name: str) -> None:
    transform = training_transform(SPEC, AUGMENTATIONS[name])
    image = picture(size=(100, 60))
    draws = [seeded(transform, image, seed) for seed in range(20)]
    assert torch.equal(draws[3], seeded(transform, image, 3))
    kinds = {pixels.numpy().tobytes() for pixels in draws}
    least = {"none": 1, "hflip": 2, "vflip": 2, "sharpness": 2}.get(name, 8)
    assert least <= len(kinds) <= (least if least < 8 else 20)


def test_all_parts_are_tried() -> None:
    assert {part.name for part in fields(Augmentation)} - {"crop", "policy"} == PARTS.keys()


IMAGES = {
    "L.png": lambda: encoded(picture().convert("L"), "PNG"),
    "P.png": lambda: encoded(picture().convert("P"), "PNG"),
    "RGBA.png": lambda: encoded(picture().convert("RGBA"), "PNG"),
    "CMYK.jpg": lambda: cmyk(picture()),
    "pixel.png": lambda: encoded(picture(size=(1, 1)), "PNG"),
    "long.png": lambda: encoded(picture(size=(4000, 10)), "PNG"),
    "high.png": lambda: encoded(picture(size=(10, 4000)), "PNG"),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("size", [16, 33])
def test_every_augmentation_takes_every_image(kind: str, size: int, tmp_path: Path) -> None:
    (tmp_path / kind).write_bytes(IMAGES[kind]())
    image = read_image(tmp_path / kind)
    spec = replace(SPEC, size=size)
    for name, parts in AUGMENTATIONS.items():
        for seed in range(4):
            pixels = seeded(training_transform(spec, parts), image, seed)
            assert pixels.shape == (3, size, size) and pixels.isfinite().all(), name


@pytest.mark.parametrize("mode", [mode.value for mode in v2.InterpolationMode])
def test_every_interpolation_goes_with_every_augmentation(mode: str) -> None:
    spec = replace(SPEC, interpolation=mode)
    for parts in AUGMENTATIONS.values():
        assert training_transform(spec, parts)(GREY).shape == (3, 32, 32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_same_whatever_the_workers(name: str, flat: Path) -> None:
    images = TrainingImages(
        read_dataset(flat).train, training_transform(SPEC, PRESETS[name]), seed=5
    )
    keys = KeyedBatches(len(images), 6, 5, 2)
    alone, together = (list(TrainingBatches(images, keys, Loading(6, n))) for n in (0, 2))
    assert len(alone) == len(together) == len(keys)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_lighting_follows_the_principal_axes() -> None:
    """The shifts' covariance has the axes as eigenvectors, (sigma × value)² as eigenvalues."""
    torch.manual_seed(0)
    lighting, black = Lighting(0.1), torch.zeros(3, 2, 2)
    shifts = torch.stack([lighting(black) for _ in range(5000)])
    assert torch.equal(shifts, shifts[..., :1, :1].expand_as(shifts))  # one for all pixels
    values, axes = torch.linalg.eigh(shifts[:, :, 0, 0].T.cov())
    assert torch.allclose(values.flip(0).sqrt(), 0.1 * Lighting.VALUES, rtol=0.05)
    assert torch.allclose((axes.flip(1).T @ Lighting.AXES).abs(), torch.eye(3), atol=0.02)


# ---------------------------------------------------------------- batches


MIXES = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1}, "both": {"mixup": 0.4, "cutmix": 1}}


@pytest.mark.parametrize("settings", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("size", [2, 5, 8])
def test_mixed_loss_is_the_two_target_form(settings: dict[str, float], size: int) -> None:
    """λ CE(y, a) + (1 - λ) CE(y, b), as both papers write it."""
    labels = torch.arange(size)  # each image in a class of its own, and of its own brightness
    pixels = labels.float()[:, None, None, None].expand(-1, 3, 20, 16)
    logits = torch.randn(size, size + 1, generator=torch.Generator().manual_seed(0))
    mix, shares = mixing(AugmentationConfig(**settings), size + 1), set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = mix(pixels, labels)
        assert mixed.shape == pixels.shape and targets.shape == (size, size + 1)
        share = float(targets[0, 0])
        shares.add(share)
        neighbours = labels.roll(1)
        expected = share * SUM(logits, labels) + (1 - share) * SUM(logits, neighbours)
        assert torch.allclose(SUM(logits, targets), expected)
        shown = share * labels + (1 - share) * neighbours  # of all pixels, in either way of mixing
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), shown, atol=1e-4)
    assert len(shares) > 10


def test_with_both_either_is_drawn() -> None:
    mix = mixing(AugmentationConfig(mixup=1, cutmix=1), 2)
    pixels, labels = torch.tensor([0.0, 1.0])[:, None, None, None].expand(-1, 3, 8, 8), [0, 1]
    kinds = []
    for seed in range(60):
        torch.manual_seed(seed)
        mixed, _ = mix(pixels, torch.tensor(labels))
        kinds.append(bool(((mixed > 0) & (mixed < 1)).any()))
    assert 15 < sum(kinds) < 45


def test_a_single_image_stays_as_it_is_and_one_that_is_ignored_has_no_weight() -> None:
    mix = mixing(AugmentationConfig(mixup=1, cutmix=1), 4)
    for label in (2, IGNORED):
        pixels, labels = torch.rand(1, 3, 8, 8), torch.tensor([label])
        mixed, targets = mix(pixels, labels)
        assert torch.equal(mixed, pixels) and torch.equal(targets, labels)
    loss = partial(cross_entropy, reduction="sum", label_smoothing=0.1)
    assert loss(torch.randn(1, 4), targets) == 0


def test_mixing_is_seeded_by_the_step_and_survives_small_parts() -> None:
    ends = []
    for micro_batch in (None, 2, 4):
        torch.rand(micro_batch or 1)  # whatever came before
        network = Small()
        kept = [network.layers[1]]  # BatchNorm would see other parts
        mix = mixing(AugmentationConfig(mixup=0.4, cutmix=1), 3)
        of_step = state(network, keep_statistics=kept, mix=mix, micro_batch=micro_batch)
        events = list(train(of_step, batches(), SUM))
        ends.append(weights(network))
        assert all(0 <= e.accuracy <= 1 for e in events if isinstance(e, EpochDone))
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-6)
    assert torch.allclose(ends[0], ends[2], rtol=0, atol=1e-6)


def test_accuracy_counts_the_class_with_the_greatest_share() -> None:
    network = Small()
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.copy_(torch.tensor([0.0, 1, 0]))  # says class 1
    shares = torch.tensor([[0.4, 0.6, 0], [0.6, 0.4, 0]]).repeat(BATCH // 2, 1)
    mixed = state(network, mix=lambda pixels, labels: (pixels, shares))
    mixed.optimizer.param_groups[0]["initial_lr"] = 0
    accuracies = [e.accuracy for e in train(mixed, batches(), SUM) if isinstance(e, EpochDone)]
    assert accuracies == [0.5, 0.5]


# ---------------------------------------------------------------- settings and the sheet


def test_what_is_given_changes_the_preset() -> None:
    strong = PRESETS["strong"]
    assert augmentation(AugmentationConfig(augment="strong")) == strong
    given = AugmentationConfig(augment="strong", erase=0, hflip=False, rotation=5, vflip=True)
    assert augmentation(given) == replace(strong, erase=0, hflip=False, rotation=5, vflip=True)


def test_the_plan_tells_it_and_the_run_keeps_it(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('augment = "lecture"\nrotation = 10\n')
    outcome = cnnft(
        "finetune", flat, "--config", file, "--backbone=builtin", "--no-hflip", "--mixup=0.2",
        "--cutmix=1", "--epochs=1", "--workers=0", "--batch-size=5", "--image-size=32",
        "--runs-dir", tmp_path, "--name=run",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "lecture, no hflip, rotation 10, mixup 0.2, cutmix 1\n" in outcome.err
    kept = (tmp_path / "run" / "config.toml").read_text()
    assert 'augment = "lecture"' in kept and "hflip = false" in kept and "cutmix = 1" in kept


def test_the_sheet_shows_each_class(cnnft: Cli, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", ("ants", "蜂 ünïcødé"), 9)
    (data / "ants" / "0.png").write_bytes(b"no image")
    sheets = {}
    for name in ("none", "strong"):
        file = tmp_path / f"{name}.png"
        outcome = cnnft("check", data, "--show-augment", file, "--augment", name, "--workers=0")
        assert outcome.code == 0 and f"wrote {file}" in outcome.err, outcome.err
        sheets[name] = Image.open(file)
    assert sheets["none"].size == (8 * 164, 2 * 22 + 6 * 164)  # without the broken image
    first = {n: sheet.crop((0, 22, 160, 182)) for n, sheet in sheets.items()}
    assert first["none"].tobytes() == first["strong"].tobytes()  # as evaluated
    draws = [sheets["none"].crop((164 * n, 22, 164 * n + 160, 182)) for n in range(8)]
    assert len({draw.tobytes() for draw in draws}) == 1
    assert sheets["none"].tobytes() != sheets["strong"].tobytes()
    file = tmp_path / "turned.toml"
    file.write_text('augment = "none"\nrotation = 90\n')
    output = tmp_path / "turned.png"
    done = cnnft("check", data, "--show-augment", output, "--config", file, "--workers=0")
    assert done.code == 0, done.err
    assert Image.open(io.BytesIO(output.read_bytes())).tobytes() != sheets["none"].tobytes()


def test_sheets_that_cannot_be(cnnft: Cli, flat: Path, tmp_path: Path) -> None:
    check = partial(cnnft, "check", flat, "--workers=0")
    check("--augment=strong").fails_with(2, "give --show-augment FILE.png")
    check("--config=x.toml").fails_with(2, "--show-augment")
    check("--show-augment", tmp_path).fails_with(2, "--show-augment", "give the .png file")
    check("--show-augment=sheet.jpg").fails_with(2, "--show-augment sheet.jpg")
    check("--show-augment=a.png", "--augment=weak").fails_with(2, "--augment")
    check("--show-augment=a.png", "--config=no.toml").fails_with(2, "--config no.toml cannot be")
    check("--show-augment", flat / "ants" / "0.png" / "a.png").fails_with(1, "a.png")


@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"hflip", "vflip"}))
def test_parts_of_a_config_file_that_are_out_of_range(
    cnnft: Cli, flat: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "settings.toml"
    for value in ("-1", "1000", "nan"):
        file.write_text(f"{name} = {value}\n")
        cnnft("finetune", flat, "--config", file).fails_with(2, name, value, "out of range")
