"""The pixel cache: the same weights with it and without, and never wrong pixels."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Outcome, draw
from PIL import Image
from safetensors.torch import load_file

from cnnft import CnnftError, Config, finetune
from cnnft.cache import store
from cnnft.cache.pixels import CachedImages, CacheProgress, cache_images, training_pixels
from cnnft.data.images import FULL, PixelSpec, read_image
from cnnft.data.loading import ImageFiles, Loading, view_batches
from cnnft.data.reading import read_dataset
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import UsageError
from cnnft.machine.memory import container_memory
from cnnft.runs.run import Run
from cnnft.training.events import Stopped
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare

Cli = Callable[..., Outcome]
SPEC = InputSpec(24, 0.75, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """2 classes of 6 JPEGs of 3 shapes, one of them twice, one lying on its side."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("ants", "bees")):
        for n in range(6):
            size = [(400, 300), (170, 260), (90, 60)][n % 3]
            path = draw(folder / name / f"{n}.png", label, n, size)
            turned = Image.Exif()
            turned[0x0112] = 6 if n == 1 else 1
            Image.open(path).save(path.with_suffix(".jpg"), exif=turned)
            path.unlink()
    (folder / "bees" / "again.jpg").write_bytes((folder / "bees" / "0.jpg").read_bytes())
    return folder


def cached_images(folder: Path, pixels: PixelSpec = FULL, crop: InputSpec | None = None):
    samples = read_dataset(folder, ("train",)).train
    return CachedImages(ImageFiles(samples.paths, pixels, crop), samples.hashes, "images")


def fill(images: CachedImages, cache: str) -> list[CacheProgress]:
    return list(cache_images([images], cache, epochs=2))


def same(images: CachedImages) -> bool:
    pairs = [(images[i], images.files[i]) for i in range(len(images.files.paths))]
    return all(one.size == two.size and one.tobytes() == two.tobytes() for one, two in pairs)


def forget_files(images: CachedImages) -> list[Image.Image]:
    """What the files hold; from here on they cannot be read."""
    before = [images.files[i] for i in range(len(images.files.paths))]
    for path in images.files.paths:
        Path(path).unlink()
    return before


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (401, 299), (100, 100), (100, 2000)])
def test_a_reduced_copy_has_so_many_pixels_on_its_shorter_side(tmp_path: Path, size) -> None:
    path = draw(tmp_path / "x.png", 0, 0, size)
    image = read_image(path, PixelSpec(100))
    assert min(image.size) == 100
    assert abs(max(image.size) - max(size) * 100 / min(size)) <= 0.5
    smaller = read_image(path, PixelSpec(500))
    assert np.array_equal(np.asarray(smaller), np.asarray(read_image(path)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_draft_mode_reads_a_jpeg_at_a_fraction_and_nearly_the_same(tmp_path: Path, mode) -> None:
    image = Image.radial_gradient("L").resize((1000, 700)).convert(mode)
    image.save(tmp_path / "x.jpg", quality=95)
    exact = read_image(tmp_path / "x.jpg", PixelSpec(100))
    draft = read_image(tmp_path / "x.jpg", PixelSpec(100, "draft"))
    one, two = (np.asarray(image, dtype=float) for image in (exact, draft))
    assert exact.size == draft.size == (143, 100)
    assert 0 < abs(one - two).mean() < 2


def test_draft_mode_leaves_alone_what_it_cannot_halve(photos: Path) -> None:
    for path in photos.glob("*/*.jpg"):
        exact, draft = (read_image(path, PixelSpec(160, d)) for d in ("pillow", "draft"))
        assert exact.tobytes() == draft.tobytes()


def test_the_resolution_of_training_follows_the_input() -> None:
    assert training_pixels(Config.of("x").input, SPEC) == PixelSpec(48)
    assert training_pixels(Config.of("x", decoder="draft").input, SPEC) == PixelSpec(48, "draft")
    assert training_pixels(Config.of("x", train_resolution=100).input, SPEC) == PixelSpec(100)
    assert training_pixels(Config.of("x", train_resolution="full").input, SPEC) == FULL


# ---------------------------------------------------------------- what is cached is right


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("pixels", [FULL, PixelSpec(100), PixelSpec(100, "draft")])
def test_cached_images_are_those_of_the_files(photos: Path, pixels: PixelSpec, cache: str) -> None:
    images = cached_images(photos, pixels)
    assert len(images.contents) == 12
    assert [event.images for event in fill(images, cache)] == list(range(1, 13))
    assert same(images)
    copy = pickle.loads(pickle.dumps(images))
    expected = forget_files(images)
    for view in (images, copy):
        assert [view[i].tobytes() for i in range(13)] == [image.tobytes() for image in expected]


def test_cached_crops_give_the_evaluation_view_to_the_last_bit(photos: Path) -> None:
    images = cached_images(photos, crop=SPEC)
    fill(images, "ram")
    views, paths = EvaluationViews(SPEC), images.files.paths
    loading = Loading(20, 0)
    plain = next(iter(view_batches(paths, views, loading))).pixels
    cached = next(iter(view_batches(paths, views.of_crop, loading, images))).pixels
    assert plain.shape == (13, 1, 3, 24, 24) and torch.equal(plain, cached)


def test_the_disk_is_read_without_decoding_again(photos: Path) -> None:
    fill(cached_images(photos, PixelSpec(100)), "disk")
    again = cached_images(photos, PixelSpec(100))
    for cache in ("auto", "disk"):
        assert fill(again, cache) == []
        assert again.cached.path == again.path
    assert len(fill(cached_images(photos, PixelSpec(101)), "disk")) == 12  # other pixels
    assert len(fill(cached_images(photos, PixelSpec(100, "draft")), "disk")) == 12


def test_names_and_their_order_do_not_matter_and_content_does(photos: Path) -> None:
    fill(cached_images(photos, PixelSpec(100)), "disk")
    (photos / "ants" / "0.jpg").rename(photos / "ants" / "zebra.jpg")
    renamed = cached_images(photos, PixelSpec(100))
    assert fill(renamed, "disk") == [] and same(renamed)
    draw(photos / "ants" / "1.png", 0, 99, (400, 300)).rename(photos / "ants" / "1.jpg")
    changed = cached_images(photos, PixelSpec(100))
    assert len(fill(changed, "disk")) == 12 and same(changed)


def truncate(content: bytearray) -> None:
    del content[len(content) // 2 :]


def flip_sizes(content: bytearray) -> None:
    start = 8 + int.from_bytes(content[:8], "little")
    content[start] ^= 1


def only_header(content: bytearray) -> None:
    del content[8:]


def nothing(content: bytearray) -> None:
    content.clear()


def one_more(content: bytearray) -> None:
    content += b"x"


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(".safetensors", damage) for damage in (truncate, flip_sizes, only_header, nothing)]
    + [(".pixels", damage) for damage in (truncate, one_more, nothing, None)],
)
@pytest.mark.parametrize("cache", ["disk", "auto"])
def test_a_damaged_file_is_never_trusted(photos: Path, suffix, damage, cache: str) -> None:
    first = cached_images(photos, PixelSpec(100))
    fill(first, "disk")
    path = first.path.with_suffix(suffix)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage is not None:
        damage(content)
        path.write_bytes(content)
    again = cached_images(photos, PixelSpec(100))
    assert len(fill(again, cache)) == 12  # they are decoded again
    assert same(again)


def test_what_was_half_written_does_not_appear(photos: Path, cache_folder: Path) -> None:
    images = cached_images(photos)
    with closing(cache_images([images], "disk", 2)) as progress:
        for _ in range(5):
            next(progress)
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == [cache_folder / ".lock"]
    assert same(images)
    left = [cache_folder / "pixels" / name for name in (".left.unfinished", "left.pixels")]
    for path in left:  # by a process that was killed
        path.write_bytes(b"x")
    fill(images, "disk")
    assert not any(path.exists() for path in left) and same(images)


def test_a_file_that_changed_since_it_was_hashed_is_not_cached(photos: Path) -> None:
    images = cached_images(photos)
    draw(photos / "ants" / "x.png", 0, 99).rename(photos / "ants" / "2.jpg")
    for cache in ("ram", "disk", "auto"):
        with pytest.raises(CnnftError, match=r"2\.jpg: is another file than before: the data ch"):
            fill(images, cache)


# ---------------------------------------------------------------- bounds


def test_auto_takes_memory_then_the_disk_then_nothing(photos, monkeypatch, caplog) -> None:
    images = cached_images(photos)
    fill(images, "auto")
    assert images.cached is not None and images.cached.path is None
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    fill(images, "auto")
    assert images.cached.path == images.path
    images.path.unlink()
    monkeypatch.setenv("CNNFT_CACHE_LIMIT", "1e-6")
    other = cached_images(photos)
    assert fill(other, "auto") == [] and other.cached is None and same(other)
    assert "no pixel cache: the decoded images take about" in caplog.text


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """cgroup version 2, then 1; the page cache is free memory."""
    assert container_memory(tmp_path) == float("inf")
    (tmp_path / "memory").mkdir()
    for folder, limit, used in (
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (tmp_path, "memory.max", "memory.current"),
    ):
        (folder / limit).write_text("1000\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text("inactive_file 100\nactive_file 50\nanon 7\n")
        assert container_memory(tmp_path) == 450
        (folder / used).write_text("800\n")
    assert container_memory(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").unlink()
    assert container_memory(tmp_path) == float("inf")


def test_one_epoch_needs_no_cache(photos: Path) -> None:
    assert list(cache_images([cached_images(photos)], "auto", epochs=1)) == []
    assert len(list(cache_images([cached_images(photos)], "ram", epochs=1))) == 12


def test_memory_is_bounded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images are larger than those that were looked at, the rest is decoded each time."""
    images = cached_images(photos)
    monkeypatch.setattr(CachedImages, "bytes", lambda self: 500_000)
    fill(images, "ram")
    assert images.cached.pixels.nbytes == 500_000
    assert 0 < int((images.cached.sizes[:, 0] > 0).sum()) < 12
    assert same(images)


@pytest.mark.parametrize("pixels", [FULL, PixelSpec(100), PixelSpec(100, "draft")])
def test_the_room_that_images_take_is_known_before(photos: Path, pixels: PixelSpec) -> None:
    images = cached_images(photos, pixels)
    fill(images, "ram")
    assert (images.cached.sizes > 0).all()
    assert int(images.cached.ends[-1]) <= images.bytes() <= 1.1 * int(images.cached.ends[-1])


def test_what_was_used_longest_ago_goes_first(photos: Path, monkeypatch) -> None:
    many = [cached_images(photos, PixelSpec(side)) for side in (20, 21, 22)]
    for age, images in zip((30, 10, 20), many, strict=True):
        fill(images, "disk")
        stamp = images.path.stat().st_mtime - age
        os.utime(images.path, (stamp, stamp))
    sizes = sum(entry.bytes for entry in store.entries())
    assert sizes == sum(path.stat().st_size for path in store.root().glob("pixels/*.*"))
    monkeypatch.setenv("CNNFT_CACHE_LIMIT", str((sizes + 1000) / 1e9))
    newest = cached_images(photos, PixelSpec(23))
    fill(newest, "disk")
    for suffix in (".safetensors", ".pixels"):
        paths = [images.path.with_suffix(suffix) for images in (*many, newest)]
        assert [path.exists() for path in paths] == [False, True, False, True]
    assert sum(entry.bytes for entry in store.entries()) <= store.limit()


@pytest.mark.parametrize(
    ("cache", "environment", "words"),
    [
        ("disk", {"CNNFT_CACHE_LIMIT": "1e-6"}, "the cache may have 0.0 MB (CNNFT_CACHE_LIMIT)"),
        ("disk", {"CNNFT_CACHE_LIMIT": "much"}, "CNNFT_CACHE_LIMIT 'much': give a number"),
        ("disk", {"CNNFT_CACHE": "/dev/null/x"}, "/dev/null/x cannot be written (Not a directory)"),
        ("disk", {"CNNFT_CACHE": "/dev/null"}, "/dev/null is no folder for the cache"),
        ("ram", {}, "50% of the free memory is"),
    ],
)
def test_no_room_where_it_was_asked_for(photos, monkeypatch, cache, environment, words) -> None:
    images = cached_images(photos)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CnnftError) as raised:
        fill(images, cache)
    assert str(raised.value).startswith(f"--cache {cache}: ") and words in str(raised.value)


# ---------------------------------------------------------------- training


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model.safetensors") | run.load_checkpoint().tensors


def train(data: Path, name: str, **settings: object) -> Run:
    common = {
        "backbone": "builtin", "epochs": 2, "batch_size": 4, "device": "cpu", "workers": 0,
        "image_size": 32, "runs_dir": data.parent / "runs", "probe_first": False,
        "batchnorm": "train",
    }  # fmt: skip
    return finetune(data, name=name, **common | settings)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"decoder": "draft", "train_resolution": 100}, marks=pytest.mark.slow)],
)
def test_weights_do_not_depend_on_the_cache(photos: Path, settings: dict) -> None:
    expected = weights(train(photos, "off", cache="off", **settings))
    for cache, workers in (("ram", 0), ("ram", 2), ("disk", 0), ("disk", 2), ("off", 2)):
        found = weights(
            train(photos, f"{cache}{workers}", cache=cache, workers=workers, **settings)
        )
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_resolution_of_training_changes_the_weights(photos: Path) -> None:
    runs = [train(photos, f"r{side}", train_resolution=side) for side in (32, "full")]
    one, two = map(weights, runs)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert runs[0].config().input.train_resolution == 32


SPAWNED = """
import multiprocessing, sys
from pathlib import Path
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from test_pixelcache import train
    train(Path(sys.argv[1]), sys.argv[2], cache=sys.argv[2], workers=2)
"""


@pytest.mark.slow
def test_processes_that_inherit_no_memory(photos: Path, tmp_path: Path) -> None:
    """As on macOS and Windows."""
    expected = weights(train(photos, "off", cache="off"))
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    for cache in ("ram", "disk"):
        subprocess.run(
            [sys.executable, script, photos, cache],
            env=os.environ | {"PYTHONPATH": search}, check=True, timeout=300,
        )  # fmt: skip
        found = weights(Run.open(photos.parent / "runs" / cache))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("cache", ["ram", pytest.param("disk", marks=pytest.mark.slow)])
def test_stopped_while_images_are_decoded_and_resumed(photos: Path, tmp_path, cache: str) -> None:
    settings = {
        "backbone": "builtin", "epochs": 2, "batch_size": 4, "device": "cpu", "workers": 0,
        "image_size": 32, "runs_dir": tmp_path / "runs", "probe_first": False,
        "batchnorm": "train", "cache": cache, "name": "stopped",
    }  # fmt: skip
    seen = []
    for event in run_plan(prepare(Config.of(photos, **settings)), stop=lambda: len(seen) > 3):
        seen.append(event)
    assert (
        isinstance(seen[-2], CacheProgress) and isinstance(seen[-1], Stopped) and seen[-1].step == 0
    )
    run = seen[-1].run
    for event in run_plan(prepare(run.config()), run):
        last = event
    expected = weights(train(photos, "off", cache="off"))
    assert all(torch.equal(expected[name], weights(last.run)[name]) for name in expected)


def test_a_run_goes_on_with_another_cache(cnnft: Cli, photos: Path, tmp_path: Path) -> None:
    run = train(photos, "run", cache="ram", epochs=1)
    outcome = cnnft("finetune", "--resume", run.path, "--epochs=2", "--cache=off")
    assert outcome.code == 0, outcome.err
    outcome = cnnft("finetune", "--resume", run.path, "--epochs=3", "--decoder=draft")
    outcome.fails_with(2, "differ in decoder")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache", "tape"], "'tape' is not one of"),
        (["--decoder", "gpu"], "'gpu' is not one of"),
    ],
)
def test_flags(cnnft: Cli, photos: Path, arguments: list[str], words: str) -> None:
    cnnft("finetune", photos, *arguments).fails_with(2, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_resolution": 8}, "train_resolution 8 is out of range: it must be at least 16"),
        ({"train_resolution": "half"}, "train_resolution 'half' is unknown"),
        ({"train_resolution": "full", "decoder": "draft"}, "--decoder draft"),
    ],
)
def test_settings(settings: dict, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        Config.of("x", **settings)
    assert words in str(raised.value)


def test_the_cache_is_shown_and_cleared(cnnft: Cli, photos: Path, cache_folder: Path) -> None:
    assert f"0.0 MB of at most 50.0 GB in {cache_folder}" in cnnft("cache").out
    train(photos, "run", cache="disk")
    outcome = cnnft("cache")
    assert outcome.code == 0 and "11 training images of photos" in outcome.out
    assert "2 of photos (val)" in outcome.out
    listed = json.loads(cnnft("cache", "--json").out)
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"]) > 1000
    assert {entry["kind"] for entry in listed["entries"]} == {"pixels"}
    (cache_folder / "pixels" / "damaged.safetensors").write_bytes(b"x")
    assert "damaged" in cnnft("cache").out
    outcome = cnnft("cache", "--clear")
    assert outcome.out.startswith("removed 3 file(s), ")
    assert not list(cache_folder.glob("*/*"))
    assert cnnft("cache", "--clear").out.startswith("removed 0 file(s)")


def test_a_cache_that_is_written_to_is_not_cleared(cnnft: Cli, cache_folder: Path) -> None:
    with store.writing(0):
        cnnft("cache", "--clear").fails_with(1, f"{cache_folder} is being written to")


def test_an_existing_folder_is_chosen_by_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CNNFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.root() == tmp_path / "cnnft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.root() == tmp_path / "home" / ".cache" / "cnnft"


@pytest.mark.slow
def test_processes_share_what_the_disk_has(photos: Path, tmp_path: Path, cache_folder) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tools.each_step import start_torchrun

    flags = [
        *("--backbone=builtin", "--epochs=2", "--batch-size=4", "--device=cpu", "--workers=0"),
        *("--image-size=32", "--batchnorm=frozen", f"--runs-dir={tmp_path / 'runs'}"),
    ]
    started = start_torchrun(2, "-m", "cnnft", "finetune", photos, *flags, "--name=run")
    _, err = started.communicate(timeout=300)
    assert started.returncode == 0, err
    assert err.count("decoding 12 images once") == 1
    assert len(list(cache_folder.glob("pixels/*.safetensors"))) == 2


def test_a_limit_that_is_none_is_known_before_anything_is_shown(cnnft: Cli, monkeypatch) -> None:
    monkeypatch.setenv("CNNFT_CACHE_LIMIT", "abc")
    cnnft("cache").fails_with(2, "CNNFT_CACHE_LIMIT 'abc'")
