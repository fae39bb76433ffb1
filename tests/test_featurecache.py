"""Where networks are cut, and features that are computed once."""

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import draw
from safetensors.torch import load_file
from torch import nn

from cnnft import Config, load
from cnnft.cache import features as featurecache
from cnnft.cache import store
from cnnft.cache.features import (
    FeatureExtractor,
    Features,
    feature_key,
)
from cnnft.cache.pixels import CacheProgress
from cnnft.cache.views import ViewSet, evaluation_view_set
from cnnft.data.loading import ImageFiles, Loading
from cnnft.data.reading import read_dataset
from cnnft.data.transforms import InputSpec
from cnnft.models.backbones import open_backbone
from cnnft.models.freezing import freeze, train_mode
from cnnft.models.surgery.cut import Cut, find_cut
from cnnft.models.surgery.embed import find_head
from cnnft.models.weights import backbone_hash
from cnnft.runs.run import Run
from cnnft.training.events import Stopped
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings(flat, tmp_path, name, **more):
    more = {"mode": "feature-extractor", "epochs": 5, "head_lr": 0.1, "feature_views": 2} | more
    return Config.of(
        flat, backbone="builtin", image_size=64, workers=0, batch_size=6, name=name,
        runs_dir=tmp_path / "runs", device="cpu", **more,
    )  # fmt: skip


def finish(config, run=None):
    for event in run_plan(prepare(config, run), run):
        last = event
    return last.run


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    ("name", "mode", "stages", "shape"),
    [
        ("builtin", "feature-extractor", None, (256,)),
        ("builtin", "finetune", 1, (128, 4, 4)),
        ("mobilenetv2_050", "finetune", 2, (48, 4, 4)),
        ("torchvision/densenet121", "feature-extractor", None, (1024,)),
        ("regnetx_002", "feature-extractor", None, (368,)),  # its head pools
        ("torchvision/squeezenet1_1", "feature-extractor", None, (512, 3, 3)),  # a convolution
    ],
)
def test_what_follows_a_cut_computes_the_logits(name, mode, stages, shape):
    backbone = open_backbone(name, 3, pretrained=False, image_size=64)
    network = backbone.network
    freeze(network, backbone.head, backbone.stages, mode, stages)
    pixels = torch.randn(4, 3, 64, 64)
    cut = find_cut(network, 64)
    values = cut.activations(network, pixels)
    assert tuple(values.shape[1:]) == shape
    tail = cut.tail(network)
    torch.testing.assert_close(tail(values), network(pixels), rtol=1e-4, atol=1e-4)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    assert trained <= {id(p) for p in tail.parameters()}


def test_what_trains_everywhere_cannot_be_cut():
    backbone = open_backbone("builtin", 3, image_size=64)
    freeze(backbone.network, backbone.head, backbone.stages, "finetune")
    assert find_cut(backbone.network, 64) is None


def test_a_head_of_zeros_behind_which_every_cut_looks_right_is_no_test():
    backbone = open_backbone("builtin", 3, image_size=64)
    nn.init.zeros_(backbone.network.fc.weight)
    nn.init.zeros_(backbone.network.fc.bias)
    freeze(backbone.network, backbone.head, backbone.stages, "feature-extractor")
    assert find_cut(backbone.network, 64) is None


class Awkward(nn.Module):
    """A frozen layer, a random one, and a sum that reaches over the cut where `leaps`."""

    def __init__(self, leaps: bool) -> None:
        super().__init__()
        self.frozen, self.drop = nn.Conv2d(3, 3, 1), nn.Dropout(0.5)
        self.middle, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.leaps = leaps
        self.frozen.requires_grad_(False)

    def forward(self, pixels):
        x = self.middle(self.drop(self.frozen(pixels)))
        return self.fc((x + pixels if self.leaps else x).mean(dim=(2, 3)))


def test_layers_that_draw_at_random_stay_behind_the_cut_and_follow_the_networks_mode():
    network, pixels = Awkward(leaps=False), torch.randn(4, 3, 8, 8)
    cut = find_cut(network, 8)
    assert cut.first == "drop"
    tail, values = cut.tail(network), cut.activations(network, pixels)
    train_mode(network)
    torch.manual_seed(0)
    expected = network(pixels)
    torch.manual_seed(0)
    torch.testing.assert_close(tail(values), expected)


def test_a_network_that_uses_its_input_again_is_not_cut():
    assert find_cut(Awkward(leaps=True), 8) is None


# ---------------------------------------------------------------- features that are cached


@pytest.mark.parametrize(
    "more",
    [{"dropout": 0.3}, {"mode": "finetune", "train_stages": 1, "head_lr": 0.01, "lr": 0.001},
     {"ema": 0.9}, {"schedule": "cosine-restarts", "snapshots": 2, "epochs": 4},
     {"sampling": "balanced"}],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_cached_features_train_as_computed_ones_do(flat, tmp_path, more):
    off = finish(settings(flat, tmp_path, "off", cache="off", **more))
    for cache in ("ram", "auto"):
        on = finish(settings(flat, tmp_path, cache, cache=cache, **more))
        one, two = (load_file(run.path / "model.safetensors") for run in (off, on))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
        mine, other = on.predictions(), off.predictions()
        assert mine.samples.paths == other.samples.paths
        assert torch.equal(mine.predicted, other.predicted)
        torch.testing.assert_close(mine.log_probs.exp(), other.log_probs.exp(), rtol=0, atol=1e-4)


def test_features_themselves_agree(flat, tmp_path, cache):
    run = finish(settings(flat, tmp_path, "cached", epochs=2))
    classifier = load(run.path, device="cpu")
    shards = [load_file(path) for path in sorted((cache / "features").iterdir())]
    (val,) = (shard["values"] for shard in shards if len(shard["values"]) == 4)
    entering = []
    hook = classifier.network.fc.register_forward_pre_hook(lambda _, x: entering.append(x[0]))
    classifier.predict(run.predictions().samples.paths, batch_size=3)
    hook.remove()
    # What comes before the images is the example that folding looks at.
    torch.testing.assert_close(val, torch.cat(entering)[-len(val) :], rtol=1e-5, atol=1e-6)


def computed(monkeypatch):
    """How many images go through frozen layers from now on, one number for each batch."""
    seen, plain = [], featurecache.FeatureExtractor.__call__

    def counted(extractor, pixels):
        seen.append(len(pixels))
        return plain(extractor, pixels)

    monkeypatch.setattr(featurecache.FeatureExtractor, "__call__", counted)
    return seen


EXAMPLE = 2  # images on which the size of the features is found


def test_a_second_run_with_another_head_starts_at_once(flat, tmp_path, monkeypatch):
    first = finish(settings(flat, tmp_path, "first"))
    seen = computed(monkeypatch)
    second = finish(settings(flat, tmp_path, "second", head_init="xavier", head_lr=0.5))
    assert sum(seen) == EXAMPLE
    assert first.metrics() != second.metrics()
    finish(settings(flat, tmp_path, "more", feature_views=3))
    assert sum(seen) == 2 * EXAMPLE + 16  # one more view of the training images
    seen.clear()
    finish(settings(flat, tmp_path, "seed", seed=1))
    assert sum(seen) == EXAMPLE + 2 * 16  # other views; validation images are the same


def test_changed_images_and_damaged_files_are_computed_again(flat, tmp_path, monkeypatch, cache):
    finish(settings(flat, tmp_path, "first"))
    seen = computed(monkeypatch)
    draw(Path(Run(tmp_path / "runs" / "first").dataset().train.paths[0]), 0, 99)
    finish(settings(flat, tmp_path, "changed"))
    assert 0 < sum(seen) - EXAMPLE <= 2 * 16 + 4  # the split follows contents
    for path in (cache / "features").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    seen.clear()
    finish(settings(flat, tmp_path, "damaged"))
    assert sum(seen) == EXAMPLE + 2 * 16 + 4


def test_an_image_that_is_added_costs_its_own_time(separated, tmp_path, monkeypatch):
    finish(settings(separated, tmp_path, "first"))
    seen = computed(monkeypatch)
    draw(separated / "train" / "ants" / "-first.png", 0, 99)
    shutil.copy(separated / "train" / "bees" / "0.png", separated / "train" / "bees" / "copy.png")
    finish(settings(separated, tmp_path, "more"))
    assert sum(seen) == EXAMPLE + 2 * 2  # views of the one, and of a copy others than the first's


def test_what_was_computed_before_an_interruption_is_cached(
    separated, tmp_path, monkeypatch, cache
):
    monkeypatch.setattr(featurecache, "SAVE_EVERY", 0.0)
    plan = prepare(settings(separated, tmp_path, "stopped"))
    with closing(run_plan(plan)) as events:
        progress = (event for event in events if isinstance(event, CacheProgress))
        done = next(event.images for event in progress if "features" in event.doing)
    seen = computed(monkeypatch)
    finish(settings(separated, tmp_path, "again"))
    assert sum(seen) == EXAMPLE + 2 * 18 + 9 - done
    names = [load_file(path)["names"] for path in (cache / "features").iterdir()]
    assert len(torch.cat(names).unique(dim=0)) == sum(map(len, names))  # nothing twice


def test_the_features_of_a_probe_are_cached(flat, tmp_path, monkeypatch, cache):
    config = settings(flat, tmp_path, "run", mode="finetune", feature_views=None)
    first = prepare(config)
    seen = computed(monkeypatch)
    second = prepare(config)
    assert first.head_from == "probe" and not seen
    for one, two in zip(*(p.classifier.network.parameters() for p in (first, second)), strict=True):
        assert torch.equal(one, two)
    prepare(config.replace(cache="off"))
    assert sum(seen) == 16


def test_batchnorm_is_folded_where_features_are_computed(flat, tmp_path, monkeypatch):
    """For a probe too, where all layers are about to train."""
    compute, left = FeatureExtractor.__call__, []

    def counting(extractor, pixels):
        norms = [m for m in extractor.network.modules() if isinstance(m, nn.BatchNorm2d)]
        left.append(len(norms))
        return compute(extractor, pixels)

    monkeypatch.setattr(FeatureExtractor, "__call__", counting)
    plan = prepare(settings(flat, tmp_path, "probed", mode="finetune", feature_views=None))
    assert left and not any(left)
    assert any(isinstance(m, nn.BatchNorm2d) for m in plan.classifier.network.modules())
    left.clear()
    finish(settings(flat, tmp_path, "frozen", epochs=1))
    assert left and not any(left)


# ---------------------------------------------------------------- the key of a feature


def extractor(name="builtin", image_size=64, **more):
    backbone = open_backbone(name, 3, pretrained=False, image_size=image_size)
    place = find_head(backbone.network, backbone.head, image_size)
    hashed = backbone_hash(backbone.network, backbone.head)
    return FeatureExtractor(backbone.network, place.cut, backbone.identity, hashed, **more)


SPEC = InputSpec(64, 0.875, "bicubic", (0.5,) * 3, (0.2,) * 3)


def test_what_changes_a_feature_changes_its_key_and_nothing_else_does(monkeypatch):
    plain = extractor()
    identity, transform = plain.identity, ("evaluation", SPEC)
    others = [
        replace(plain, weights="0" * 64),
        replace(plain, cut=Cut("layer3", frozenset())),
        replace(plain, pooled=True),
        replace(plain, identity=replace(identity, architecture="resnet18")),
        replace(plain, identity=replace(identity, model_args={"drop_rate": 0.1})),
        replace(plain, rounding=(8, 1)),
        replace(plain, rounding=(16, 1)),
        replace(plain, rounding=(8, 2)),
        replace(plain, network=plain.network.to("meta")),
    ]
    keys = [feature_key(other, transform) for other in others[:-1]]
    keys.append(feature_key(others[-1], transform))
    keys += [
        feature_key(extractor(), other)
        for other in (
            transform, ("training", SPEC), ("evaluation", replace(SPEC, crop_fraction=1.0)),
        )
    ]  # fmt: skip
    monkeypatch.setattr(featurecache, "version", lambda name: f"9 of {name}")
    keys.append(feature_key(extractor(), transform))
    assert len(set(keys)) == len(keys)
    renamed = replace(identity, name="another name", pretrained_cfg={"license": "mit"})
    assert feature_key(replace(extractor(), identity=renamed), transform) == keys[-1]


def test_names_and_order_of_files_do_not_change_a_feature(flat, cache):
    """Nor do copies of an image."""

    def features(samples):
        images = ImageFiles(samples.paths, crop=SPEC)
        views = evaluation_view_set(samples, SPEC, images, Loading(4, 0), "images")
        return Features(extractor(pooled=True), views, on_disk=True)

    torch.manual_seed(0)
    first = features(read_dataset(flat, ("train",)).train)
    assert len(first.missing) == 20
    list(first.compute())
    for path in [*flat.glob("*/*.png")]:
        path.rename(path.with_name(f"{20 - int(path.stem)}-renamed.png"))
    shutil.copy(next(flat.glob("ants/*")), flat / "ants" / "copy.png")
    torch.manual_seed(0)  # the same random weights
    samples = read_dataset(flat, ("train",)).train
    again = features(samples)
    assert again.missing == [] and again.values.shape == (21, 256)
    order = {digest: row for row, digest in enumerate(samples.hashes)}
    assert len(order) == 20
    assert again.values.unique(dim=0).shape == first.values.unique(dim=0).shape


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_features_of_another_batch_size_agree_to_rounding(flat, batch_size):
    samples = read_dataset(flat, ("train",)).train
    images = ImageFiles(samples.paths, crop=SPEC)
    torch.manual_seed(0)
    one = extractor(pooled=True)

    def computed_in(size):
        views = evaluation_view_set(samples, SPEC, images, Loading(size, 0), "images")
        features = Features(one, views, on_disk=False)
        list(features.compute())
        return features.values

    torch.testing.assert_close(computed_in(batch_size), computed_in(8), rtol=1e-5, atol=1e-6)


def test_images_that_are_not_augmented_have_one_view(flat, tmp_path):
    plan = prepare(settings(flat, tmp_path, "plain", augment="none"))
    assert plan.batches.views == 1


@pytest.mark.parametrize("reason", ["memory", "mixup", "off"])
def test_where_features_are_not_cached_training_goes_on(flat, tmp_path, monkeypatch, reason, cache):
    more = {"mixup": {"mixup": 0.2, "feature_views": None}, "off": {"cache": "off"}}.get(reason, {})
    if reason == "memory":
        monkeypatch.setattr(featurecache, "MEMORY_SHARE", 0.0)
    run = finish(settings(flat, tmp_path, "run", epochs=2, **more))
    assert run.metrics().val.n == 4
    assert not (cache / "features").exists()


def test_a_cache_without_room_leaves_them_out(flat, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("CNNFT_CACHE_LIMIT", "0")
    finish(settings(flat, tmp_path, "run", epochs=2))
    assert store.entries() == []


def test_a_stopped_run_goes_on_with_cached_features(flat, tmp_path):
    expected = finish(settings(flat, tmp_path, "whole"))
    steps = []
    plan = prepare(settings(flat, tmp_path, "stopped"))
    for event in run_plan(plan, stop=lambda: len(steps) >= 4):
        if isinstance(event, StepDone):
            steps.append(event)
    assert isinstance(event, Stopped)
    run = finish(event.run.config(), Run.open(event.run.path))
    one, two = (load_file(r.path / "model.safetensors") for r in (expected, run))
    assert all(torch.equal(one[name], two[name]) for name in one)
    largest = max(p.stat().st_size for p in (run.path / "state").glob("*.safetensors"))
    assert largest < (run.path / "model.safetensors").stat().st_size / 10  # what trains alone


def test_other_backbone_weights_than_before_are_refused_on_resume(cnnft, flat, tmp_path):
    run = finish(settings(flat, tmp_path, "run"))
    text = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(text.replace("pretrained = true", "pretrained = false"))
    cnnft("finetune", "--resume", run.path).fails_with(1, "weights are others")


def test_feature_views_need_frozen_layers(cnnft, flat):
    outcome = cnnft("finetune", flat, "--mode=finetune", "--feature-views", 2)
    outcome.fails_with(2, "--feature-views", "frozen layers")


def plain_features(names):
    """In batches of 4 blank images."""

    def batches(rows):
        for start in range(0, len(rows), 4):
            yield torch.ones(len(rows[start : start + 4]), 3, 64, 64)

    return Features(extractor(), ViewSet("x", names, batches, 4), on_disk=True)


@pytest.mark.parametrize("left", [range(4), range(4, 8), range(8, 10)])
def test_missing_features_are_computed_in_the_batches_of_an_undisturbed_run(left) -> None:
    """What a kill left, here one of three batches, does not change the last digits."""
    list(plain_features(left).compute())  # the names are those of the rows below
    whole = [list(rows) for rows in (range(4), range(4, 8), range(8, 10)) if rows != left]
    assert plain_features(range(10))._missing_batches() == whole


def test_new_images_among_others_share_batches() -> None:
    list(plain_features([row for row in range(12) if row not in (1, 6, 11)]).compute())
    assert plain_features(range(12))._missing_batches() == [[1, 6, 11]]
