"""Give every reader of outside bytes damaged and hostile files: it reads them, or says why not.

    python -m tools.fuzz [--minutes 60] [--target NAME] [--seed N]

docs/results/fuzz.json has the sum over all such commands, docs/reliability.md its table; it may be
interrupted at any time, and no command repeats the seeds of another. `--minutes 0` writes the table
alone.

Valid files are made by cnnft itself, damaged with their structure in mind, and read in a process of
its own. A reader may return or raise `CnnftError` in one line. It may not raise anything else, take
longer than `LIMIT` seconds or more than `MEMORY`, start a process, open a connection or write.
`--target NAME --seed N` repeats one example, with its traceback.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from itertools import count, cycle
from multiprocessing import get_context
from pathlib import Path
from random import Random
from secrets import randbelow

import numpy as np
import tomli_w
import torch
from PIL import Image

from cnnft import CnnftError, finetune
from cnnft.analysis.export import export_model
from cnnft.cache.features import FeatureExtractor, Features
from cnnft.cache.pixels import CachedImages, cache_images
from cnnft.cache.pixels import _open as open_cached
from cnnft.cache.views import ViewSet
from cnnft.cli.console import printable
from cnnft.config.file import read_config_file
from cnnft.config.schema import Config
from cnnft.data.dataset import Samples
from cnnft.data.images import find_problem, ignoring_oddities, read_image
from cnnft.data.loading import ImageFiles
from cnnft.data.reading import read_dataset
from cnnft.data.split import split
from cnnft.inference.classifier import Classifier
from cnnft.inference.description import describe
from cnnft.inference.predictions import Predictions
from cnnft.inference.storage import load
from cnnft.machine.files import to_safetensors
from cnnft.models.backbones import Backbone, open_backbone
from cnnft.models.build import build
from cnnft.models.heads import initialise
from cnnft.models.registry import described_beside
from cnnft.models.surgery.cut import find_cut
from cnnft.models.surgery.stagehead import head_stages, put_on_stages
from cnnft.models.weights import load_weights
from cnnft.runs.checkpoints import load_checkpoint
from cnnft.runs.predictions import predictions_from_csv, predictions_to_csv
from cnnft.runs.records import (
    data_from_csv,
    data_to_csv,
    skipped_from_csv,
    skipped_to_csv,
    what_changed,
)
from cnnft.runs.run import Run
from tools.document import fill
from tools.forked import TINY, make_backbone
from tools.tally import DOCUMENT, Tally, joined, table

LIMIT = 10.0
MEMORY = 4 << 30
"""Bytes of address space besides what the process has before it reads."""
LONGEST_MESSAGE = 1000

Files = dict[str, bytes]
"""Path in the example's folder -> content."""


@dataclass(frozen=True)
class Target:
    """A way into cnnft."""

    seeds: tuple[Files, ...]
    damage: Callable[[Random, Files], Files]
    reads: tuple[Callable[[Path], object], ...]
    """Each is called with the example's folder, whatever became of the one before."""


# ---------------------------------------------------------------- damage

ODD_NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**63, 10**6, 10**9, 10**12, 10**30, 10**400, True)
ODD_FLOATS = (0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))
ODD_TEXTS = (
    *("", "a", "/etc/passwd", "../../../../tmp/owned", "\x00", "\ud800", "\udcff", "\u202e"),
    *("\x1b[2J", "two\nlines", "{}", "=1+1", "<script>", "x" * 100_000, "null", "1e999", "-1"),
    *("hf-hub:nobody/nothing", "local-dir:/tmp", "https://127.0.0.1:9/x.pth", "builtin"),
    *("resnet50", "vit_giant_patch14_dinov2", "convnext_tiny", "torchvision", "linear", "mlp"),
    *("resnet18", "regnet_y_400mf", "fasterrcnn_resnet50_fpn", "vit_b_16", "timm", "relu"),
)
ODD_VALUES = (
    *(None, False, *ODD_NUMBERS, *ODD_FLOATS, *ODD_TEXTS),
    *([], {}, [[]], [None], {"a": 1}, ["a", "a"], [10**9] * 3, [0.5] * 3, [1] * 20_000),
)
ODD_KEYS = (
    *("", "a", "num_classes", "checkpoint_path", "pretrained", "in_chans", "img_size", "depth"),
    *("layers", "channels", "block", "act_layer", "norm_layer", "global_pool", "features_only"),
    *("output_stride", "drop_rate", "scriptable", "pretrained_cfg", "weights", "state_dict"),
    *("hf_hub_id", "url", "file", "custom_load", "label_names", "fixed_input_size", "self"),
)
_DEEP = "a value nested too deeply"
"""Stands for it until the text is written: Python's own writer would refuse."""


def damage_value(random: Random, value: object) -> object:
    """A JSON value with one node changed: its value, its type, its key, or whether it is there."""
    places: list[tuple[dict | list, object]] = []

    def walk(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in items:
            places.append((node, key))
            if isinstance(inner, dict | list):
                walk(inner)

    value = json.loads(json.dumps(value))
    if not isinstance(value, dict | list) or not value or random.random() < 0.02:
        return random.choice((*ODD_VALUES, _DEEP))
    walk(value)
    node, key = random.choice(places)
    how = random.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[random.choice(ODD_KEYS)] = node.pop(key)
    elif how == 2 and isinstance(node, dict):
        node[random.choice(ODD_KEYS)] = random.choice(ODD_VALUES)
    elif how == 3:
        other, other_key = random.choice(places)
        node[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict)
                                          else other[other_key]))  # fmt: skip
    elif how == 4:
        node[key] = _DEEP
    elif how == 5 and isinstance(node[key], int | float):
        node[key] = random.choice((*ODD_NUMBERS, *ODD_FLOATS, node[key] + 1, -node[key]))
    else:
        node[key] = random.choice(ODD_VALUES)
    return value


def damage_json(random: Random, content: bytes) -> bytes:
    try:
        value = damage_value(random, json.loads(content))
    except (ValueError, RecursionError):  # it was damaged before
        return damage_bytes(random, content)
    text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    deep = random.choice((100, 1000, 100_000))
    text = text.replace(json.dumps(_DEEP), "[" * deep + "]" * deep)
    if random.random() < 0.1 and isinstance(value, dict) and value:
        key = json.dumps(random.choice(sorted(value)))
        text = text.replace(f"{key}:", f"{key}: {json.dumps(random.choice(ODD_VALUES))}, {key}:", 1)
    return text.encode("utf-8", errors="surrogatepass")


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Flipped, cut, moved, repeated, inserted bytes, and odd integers where headers have some."""
    data = bytearray(content or b"\0")
    front = min(len(data), random.choice((16, 64, 512, len(data))))
    at, length = random.randrange(front), random.choice((1, 4, 16, 256))
    how = random.randrange(7)
    if how == 0:
        data[at] ^= 1 << random.randrange(8)
    elif how == 1:
        del data[random.randrange(len(data)) :]
    elif how == 2:
        width = random.choice((1, 2, 4, 8))
        number = random.choice((0, 1, 255, 2**15, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1))
        order = random.choice(("big", "little"))
        data[at : at + width] = (number % 256**width).to_bytes(width, order)
    elif how == 3:
        source = random.randrange(len(data))
        data[at : at + length] = data[source : source + length]
    elif how == 4:
        del data[at : at + length]
    elif how == 5:
        data[at:at] = random.randbytes(length)
    else:
        data[at:at] = data[at : at + length] * random.choice((1, 2, 100))
    return bytes(data)


def damage_safetensors(random: Random, content: bytes) -> bytes:
    """The header, the description inside its metadata, the length before it, or the bytes."""
    length = int.from_bytes(content[:8], "little")
    text, body = content[8 : 8 + length], content[8 + length :]
    how = random.randrange(6)
    try:
        header = json.loads(text)
        (key, inner), *_ = header["__metadata__"].items()
        inner = inner.encode()
    except (ValueError, KeyError, RecursionError, TypeError, AttributeError):
        header = key = None
    if how == 0:
        return damage_bytes(random, content)
    if how == 1:
        length = random.choice((0, 1, 2**31, 2**40, 2**64 - 1, length - 1, length + 1))
        return (length % 2**64).to_bytes(8, "little") + text + body
    if how >= 3 and key is not None:
        changed = damage_json(random, inner).decode("utf-8", errors="replace")
        text = json.dumps(header | {"__metadata__": {key: changed}}).encode()
    else:
        text = damage_json(random, text)
    return len(text).to_bytes(8, "little") + text + body


def damage_toml(random: Random, content: bytes) -> bytes:
    try:
        value = damage_value(random, tomllib.loads(content.decode()))
        text = tomli_w.dumps(value).replace(json.dumps(_DEEP), "[" * 5000 + "]" * 5000)
    except (ValueError, TypeError, AttributeError, RecursionError):  # TOML cannot say it
        return damage_bytes(random, content)
    return text.encode("utf-8", errors="surrogatepass")


def damage_csv(random: Random, content: bytes) -> bytes:
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8", errors="replace"))))
    except csv.Error:  # damaged before
        return damage_bytes(random, content)
    if random.random() < 0.3 or len(rows) < 2 or not all(rows):
        return damage_bytes(random, content)
    row = random.choice(rows)
    how = random.randrange(4)
    if how == 0:
        rows.remove(row)
    elif how == 1:
        rows.append(random.choice(rows))
    elif how == 2:
        row.append(random.choice(ODD_TEXTS))
    else:
        row[random.randrange(len(row))] = random.choice((*ODD_TEXTS, "x" * 200_000))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogatepass")


class Attack:
    """Unpickled without care, it runs a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


def odd_objects() -> list[object]:
    """What a pickle of tensors may hold besides plain ones."""
    itself: dict[str, object] = {}
    itself["model"] = itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantization is deprecated, sparse CSR is beta
        return [
            *(Attack(), itself, None, 3, "text", [], {}, {"state_dict": {}}, {1: 2}, {"model": 1}),
            torch.zeros(1).expand(10**6, 10**6),
            torch.zeros(1).expand(1, 10**9, 3),
            *(torch.tensor(1.0), torch.zeros(0), torch.zeros(3, dtype=torch.complex64)),
            *(torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3).to_sparse_csr()),
            torch.zeros(10**6, 10**6, device="meta"),
            torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
            torch.nn.Parameter(torch.full((8,), float("nan"))),
            *(torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)),
        ]


def damage_pth(random: Random, content: bytes) -> bytes:
    """The bytes, the pickle inside, what was pickled, or the archive around it."""
    how = random.randrange(4)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # it was damaged before
        how = 0
    if how == 0:
        return damage_bytes(random, content)
    file = io.BytesIO()
    if how == 1 and isinstance(state, dict):
        state = dict(state)
        objects = odd_objects()
        for _ in range(random.choice((1, 1, 100))):
            state[random.choice([*state, "model", "state_dict"])] = random.choice(objects)
        wrapped = random.choice((state, {"model": state}, {"model": {"model": state}}, [state]))
        torch.save(wrapped, file, _use_new_zipfile_serialization=random.random() < 0.7)
        return file.getvalue()
    name = random.choice(sorted(members))
    if how == 2:
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = random.choice((damage_bytes(random, members[name]), pickle.dumps(Attack())))
    elif random.random() < 0.3:
        members[name] = bytes(20 << 20)
    elif random.random() < 0.5:
        del members[name]
    else:
        members[random.choice(("../../owned", "/tmp/owned", name))] = damage_bytes(random, b"")
    packing = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names twice
        for name, member in members.items():
            archive.writestr(name, member)
    return file.getvalue()


BY_SUFFIX = {
    ".json": damage_json,
    ".safetensors": damage_safetensors,
    ".toml": damage_toml,
    ".csv": damage_csv,
    ".pth": damage_pth,
}


def damage_files(random: Random, files: Files, names: tuple[str, ...] = ()) -> Files:
    """One to three wounds, in files of these `names` (default: any)."""
    files = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(names or tuple(sorted(files)))
        how = BY_SUFFIX.get(Path(name).suffix, damage_bytes)
        how = damage_bytes if random.random() < 0.1 else how
        files[name] = how(random, files[name])
    return files


def damage_names(random: Random, files: Files) -> Files:
    """Folders and files by other names, any that a file system takes; a few damaged files."""
    parts = sorted({part for name in files for part in name.split("/")[1:]})
    names = {part: _odd_name(random) if random.random() < 0.2 else part for part in parts}
    renamed: Files = {}
    for name, content in files.items():
        top, *rest = name.split("/")
        name = "/".join([top, *(names[part] for part in rest)])
        if not any(f"{other}/".startswith(f"{name}/") for other in renamed):  # a file and a folder
            renamed[name] = content if random.random() < 0.98 else damage_bytes(random, content)
    return renamed


def _odd_name(random: Random) -> str:
    how = random.randrange(8)
    if how == 0:
        name = os.fsdecode(random.randbytes(random.choice((1, 3, 100))))
    elif how == 1:
        name = "".join(map(chr, random.choices((*range(1, 0x300), 0x301, 0x2028, 0x1F41C), k=5)))
    elif how == 2:
        name = str(random.choice(ODD_TEXTS))
    else:
        name = random.choice(ODD_NAMES)
    name = name.replace("/", "_").replace("\0", "_") or "_"
    encoded = name.encode("utf-8", errors="surrogateescape" if "\ud800" not in name else "replace")
    name = os.fsdecode(encoded[:60])
    return name if name not in (".", "..") else name + "_"


ODD_NAMES = (
    *("train", "val", "test", "Train", "valid", "None", "none", "nan", "0", "1e3", "file", "label"),
    *("role", "fold", "sha256", "split", "class", "group", "weight", "logit:a", "A", "a", "true"),
    *("caf\u00e9", "cafe\u0301", "=1+1", '"', "'", ",", ";", "a,b", 'a"b', "a\nb", "a\rb", "\t"),
    *(" a", "a ", ".", ".hidden", "-a", "--help", "*", "?", "[a]", "%s", "{0}", "[red]", "[/]"),
    *("con", "NUL", "~", "$HOME", "\\", "a\\b", "runs", "__MACOSX", "@eaDir", ".DS_Store"),
)


def damage_checkpoint(random: Random, files: Files) -> Files:
    """Most often with the digest of the damaged content in the name: damage that was meant."""
    files = damage_files(random, files)
    if random.random() < 0.1:
        return files
    steps = random.choice(("0000000001", "0000000001", "x", "-5", "9" * 20))
    return {
        f"state/{steps}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors": content
        for content in files.values()
    }


# ---------------------------------------------------------------- targets


def make_targets(folder: Path) -> dict[str, Target]:
    """Valid files of every kind, made in `folder` by cnnft itself, and what reads each kind."""
    backbone = make_backbone(folder / "backbone")
    data = folder / "data"
    for label in range(2):
        (data / "ab"[label]).mkdir(parents=True)
        for n in range(4):
            _picture(seed=10 * label + n).save(data / "ab"[label] / f"{n}.png")
    name = f"local-dir:{backbone}"
    run = finetune(
        data, backbone=name, mode="feature-extractor",
        head_solver="sgd", epochs=1, workers=0, device="cpu",
        runs_dir=folder / "runs", name="run",
    )  # fmt: skip
    image = data / "a" / "0.png"
    train, val = split(read_dataset(data).train, 0.2, seed=0)
    state = build(TINY, 10).state_dict()
    opened = open_backbone(name, 2)
    # The first weights that do not match build 30 networks to name the likeliest; later ones share
    # them, and no example is to seem slow for it.
    with suppress(CnnftError):
        open_backbone("test_resnet", 2, weights=backbone / "model.safetensors")
    described = (backbone / "config.json").read_bytes()
    cache, features, images = folder / "cache", *_cached(opened, train)
    with _cache_in(cache):
        list(features().compute())
        list(cache_images([images()], "disk", epochs=2))
    run_files = {f"run/{p.name}": p.read_bytes() for p in run.path.iterdir() if p.is_file()}
    return {
        "image": Target(_pictures(), damage_files, (partial(_only, _read_image),)),
        "run": Target(
            (run_files,),
            damage_files,
            (
                lambda here: _use(here / "run", image),
                lambda here: Run.open(here / "run").config(),
                lambda here: Run.open(here / "run").dataset(),
                lambda here: Run.open(here / "run").predictions(),
                lambda here: Run.open(here / "run").history(),
                lambda here: Run.open(here / "run").description(),
                lambda here: Run.open(here / "run").metrics(),
                lambda here: Run.open(here / "run").environment(),
                lambda here: Run.open(here / "run").skipped(),
                lambda here: Run.open(here / "run").require_same_data(train, val),
            ),
        ),
        "head file": Target(
            ({"model.safetensors": export_model(run.path, "head", folder / "h").read_bytes()},),
            damage_files,
            (lambda here: _use(here / "model.safetensors", image),),
        ),
        "exported model": Target(
            (
                {
                    "model.safetensors": export_model(
                        run.path, "safetensors", folder / "m"
                    ).read_bytes()
                },
                {"model.safetensors": _on_stages(load(run.path, device="cpu"))},
            ),
            damage_files,
            (lambda here: _use(here / "model.safetensors", image),),
        ),
        "checkpoint": Target(
            ({f"state/{p.name}": p.read_bytes() for p in (run.path / "state").iterdir()},),
            damage_checkpoint,
            (_resume,),
        ),
        "weights .safetensors": Target(
            ({"w.safetensors": to_safetensors(state)},),
            damage_files,
            (lambda here: _fill(opened, here / "w.safetensors"),),
        ),
        "weights .pth": Target(
            tuple({"w.pth": _saved(state, zipped)} for zipped in (True, False)),
            damage_files,
            (lambda here: _fill(opened, here / "w.pth"),),
        ),
        "config file": Target(
            ({"settings.toml": run_files["run/config.toml"]},),
            damage_files,
            (lambda here: Config.from_dict(read_config_file(here / "settings.toml"), "it"),),
        ),
        "class folders": Target(
            ({f"data/{p.relative_to(data)}": p.read_bytes() for p in data.rglob("*.png")},),
            damage_names,
            (_read_folder,),
        ),
        "cached features": Target(
            (_contents(cache, "features/*.*"),),
            damage_files,
            (partial(_read_features, features),),
        ),
        "cached pixels": Target(
            (_contents(cache, "pixels/*.*"),),
            damage_files,
            (partial(_read_pixels, images),),
        ),
        "local-dir": Target(
            (
                {
                    "config.json": described,
                    "model.safetensors": (backbone / "model.safetensors").read_bytes(),
                },
            ),
            partial(damage_files, names=("config.json",) * 9 + ("model.safetensors",)),
            (
                lambda here: _try(open_backbone(f"local-dir:{here}", 2)),
                lambda here: described_beside(here / "model.safetensors", opened.identity),
            ),
        ),
    }


def _on_stages(classifier: Classifier) -> bytes:
    """The same with a head on stages, exported."""
    network, head = put_on_stages(
        classifier.network, classifier.head, ("layer1",), classifier.input_spec.size
    )
    initialise(network, head, "default")
    staged = replace(classifier, network=network, head=head, stages=head_stages(network))
    return to_safetensors(network.state_dict(), {"cnnft": json.dumps(describe(staged))})


def _contents(folder: Path, pattern: str) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern))}


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("CNNFT_CACHE")
    os.environ["CNNFT_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CNNFT_CACHE"]
        else:
            os.environ["CNNFT_CACHE"] = before


def _cached(
    backbone: Backbone, samples: Samples
) -> tuple[Callable[[], Features], Callable[[], CachedImages]]:
    """What reads features, and pixels, from the cache."""
    network = backbone.network.eval().requires_grad_(False)
    for name in backbone.head:
        network.get_parameter(name).requires_grad_()
    cut = find_cut(network, 32)
    assert cut is not None
    extractor = FeatureExtractor(network, cut, backbone.identity, "of these weights")
    views = ViewSet("plain", samples.hashes, lambda rows: [torch.zeros(len(rows), 3, 32, 32)], 8)
    return (
        partial(Features, extractor, views, True),
        partial(CachedImages, ImageFiles(samples.paths), samples.hashes, "pictures"),
    )


def _read_features(features: Callable[[], Features], here: Path) -> None:
    with _cache_in(here):
        found = features()
    if found.missing:
        raise CnnftError("not all are there: they are computed again")
    assert found.values.shape[0] == len(found.views.names)


def _read_pixels(images: Callable[[], CachedImages], here: Path) -> None:
    with _cache_in(here):
        found = images()
        if not open_cached(found):
            raise CnnftError("they are not there: they are decoded again")
    for index in range(len(found.rows)):
        found[index].load()


def _read_folder(here: Path) -> None:
    """What cnnft writes of a folder, it reads again."""
    dataset = read_dataset(here / "data")
    train, val = split(dataset.train, 0.5, seed=0)
    splits = {"train": train, "val": val}
    written = io.BytesIO(data_to_csv(splits))
    assert not what_changed(data_from_csv(written), splits)
    logits = torch.arange(len(val) * len(val.classes)).float().reshape(len(val), -1)
    table = io.BytesIO(predictions_to_csv(Predictions(val, logits, "val")))
    found = predictions_from_csv(table)
    assert found.samples.paths == val.paths and found.samples.classes == val.classes
    assert found.logits.equal(logits) and found.samples.labels == val.labels
    skipped = skipped_from_csv(io.BytesIO(skipped_to_csv(dataset.skipped)))
    assert [one.path for one in skipped] == [one.path for one in dataset.skipped]
    dumped = tomllib.loads(tomli_w.dumps(Config.of(data=here / "data").to_dict()))
    assert dumped["data"] == str(here / "data")


def _saved(state: dict[str, torch.Tensor], zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _picture(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pictures() -> tuple[Files, ...]:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture = _picture(seed=0)
    ways = [
        *[("jpg", "JPEG", {"exif": exif}), ("jpg", "JPEG", {"progressive": True})],
        *[("png", "PNG", {}), ("png", "PNG", {"exif": exif}), ("bmp", "BMP", {})],
        *[("gif", "GIF", {"save_all": True, "append_images": [picture] * 2})],
        *[("webp", "WEBP", {}), ("webp", "WEBP", {"lossless": True, "exif": exif})],
        *[("tif", "TIFF", {"compression": c}) for c in (None, "tiff_lzw", "tiff_adobe_deflate")],
        *[("png", "AVIF", {}), ("jpg", "JPEG2000", {}), ("png", "ICO", {}), ("jpg", "PPM", {})],
        *[("jpg", "MPO", {"save_all": True, "append_images": [picture]}), ("jpg", "EPS", {})],
    ]
    deep = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32))
    palette = picture.quantize(16)
    more = [("png", "PNG", {}, deep), ("tif", "TIFF", {}, deep), ("png", "PNG", {}, palette)]
    found = []
    for suffix, format, options, drawn in [(*way, picture) for way in ways] + more:
        file = io.BytesIO()
        drawn.save(file, format, **options)
        found.append({f"image.{suffix}": file.getvalue()})
    return tuple(found)


def _only(read: Callable[[Path], object], here: Path) -> None:
    (path,) = here.iterdir()
    read(path)


def _read_image(path: Path) -> None:
    with ignoring_oddities():
        problem = find_problem(path, path.read_bytes())
    read_image(path)
    assert problem is None, f"find_problem says {problem}, and read_image reads it"


def _use(model: Path, image: Path) -> None:
    """Open it, predict, and describe it again as an export does."""
    classifier = load(model, device="cpu")
    for prediction in classifier.predict([image], workers=0):
        str(prediction.label).encode()
    to_safetensors({}, {"cnnft": json.dumps(describe(classifier), ensure_ascii=False)})


def _fill(backbone: Backbone, weights: Path) -> None:
    load_weights(backbone.network, backbone.head, backbone.identity, weights)
    _try(backbone)


def _try(backbone: Backbone) -> None:
    size = backbone.input_spec.size
    with torch.inference_mode():
        assert backbone.network.eval()(torch.zeros(1, 3, size, size)).shape == (1, 2)


def _resume(here: Path) -> None:
    if load_checkpoint(here / "state") is None:
        raise CnnftError("no whole checkpoint")


# ---------------------------------------------------------------- watching


class Escape(BaseException):
    """A reader did more than read. Not an Exception, so that nothing in between swallows it."""


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = frozenset(
    {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
    | {"os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
    | {"os.symlink", "os.truncate", "pty.spawn", "shutil.copyfile", "shutil.move"}
    | {"shutil.rmtree", "socket.bind", "socket.connect", "socket.getaddrinfo"}
    | {"subprocess.Popen", "urllib.Request"}
)
_watched = False


def _audit(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if (writes and arguments[0] != os.devnull) or event in _NEVER:
        raise Escape(f"{event} {arguments}")


@cache
def _install_audit() -> None:
    """Once: it stays until the process ends."""
    sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[None]:
    """A process started, a connection opened, anything written raises `Escape`; memory is short."""
    global _watched
    _install_audit()
    limits, caching = resource.getrlimit(resource.RLIMIT_AS), sys.dont_write_bytecode
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    sys.dont_write_bytecode = _watched = True
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        sys.dont_write_bytecode, _watched = caching, False
        resource.setrlimit(resource.RLIMIT_AS, limits)


def example(target: Target, random: Random, folder: Path) -> bool:
    """Write one damaged example to `folder` and read it; returns whether all of it could be read.

    Raises:
        Escape, or whatever a reader raises that it should not.
    """
    shutil.rmtree(folder, ignore_errors=True)
    files = target.damage(random, random.choice(target.seeds))
    names = "".join(files)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    complete = True
    for read in target.reads:
        try:
            with watched():
                read(folder)
        except CnnftError as error:
            text = printable(str(error))  # as the screen has it: names may hold line breaks
            assert 0 < len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters"
            assert "\n" not in str(error) or "\n" in names, f"more than one line: {text!r}"
            complete = False
    return complete


# ---------------------------------------------------------------- the tool


def _serve(connection, targets: dict[str, Target], folder: Path) -> None:
    """In a process of its own: examples in, what became of them out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)  # libtiff and others speak for themselves
    while True:
        name, seed = connection.recv()
        try:
            outcome = "read" if example(targets[name], Random(seed), folder) else "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                return
            frames = traceback.extract_tb(error.__traceback__)
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])
            reason = (str(error).splitlines() or [""])[0][:200]
            kind = "escape" if isinstance(error, Escape) else "exception"
            outcome = f"{kind}: {type(error).__name__}: {reason} ({where})"
        connection.send(outcome)


def run(
    targets: dict[str, Target], chosen: list[str], first: int, minutes: float, folder: Path
) -> Iterator[tuple[str, str, float]]:
    """Yields (target, outcome, seconds) of examples in turn, until time is up.

    Their seeds are `first` and those after it.
    """
    context = get_context("fork")
    worker = connection = None
    until = time.monotonic() + 60 * minutes
    for name, seed in zip(cycle(chosen), count(first)):
        if time.monotonic() > until:
            break
        if worker is None:
            connection, other = context.Pipe()
            arguments = (other, targets, folder / "example")
            worker = context.Process(target=_serve, args=arguments, daemon=True)
            worker.start()
            other.close()
        started = time.monotonic()
        connection.send((name, seed))
        outcome = None
        try:
            outcome = connection.recv() if connection.poll(LIMIT) else "hang"
        except EOFError:
            worker.join()
            outcome = f"crash: exit code {worker.exitcode}"
        if outcome.startswith(("hang", "crash")):
            worker.kill()
            worker.join()
            worker = None
        if outcome not in ("read", "refused"):
            outcome = f"{outcome} (--target {name!r} --seed {seed})"
        yield name, outcome, time.monotonic() - started
    if worker is not None:
        worker.kill()


FAILURES = {"exception": "other exceptions", "hang": "hangs", "crash": "crashes",
            "escape": "escapes"}  # fmt: skip

COUNTED_AT_ONCE = 500
"""Examples, of which an interruption of this tool loses the counts."""


def fuzz(targets: dict[str, Target], minutes: float, folder: Path, tally: Tally) -> None:
    counts: dict[str, Counter[str]] = {}
    findings: dict[str, str] = {}
    examples = run(targets, list(targets), tally.record["seed"], minutes, folder)

    def keep() -> None:
        tally.add(counts, findings)
        counts.clear()

    for name, outcome, seconds in examples:
        kind = outcome.partition(":")[0].split(" ")[0]
        one = {"examples": 1, kind: 1, "slowest": round(seconds, 1)}
        counts[name] = joined(counts.get(name, {}), one)
        if kind in FAILURES and outcome not in findings.values():
            findings[name] = outcome
            print(outcome, flush=True)
        if kind in FAILURES or sum(n["examples"] for n in counts.values()) >= COUNTED_AT_ONCE:
            keep()
    keep()


def since_last_finding(tally: Tally) -> Callable[[dict], bool]:
    """Chooses the records after the last one with a failure, whose cause was mended then."""

    def failed(record: dict) -> bool:
        return any(rows.get(kind) for rows in record["rows"].values() for kind in FAILURES)

    records = tally.records()
    last = max((n for n, record in enumerate(records) if failed(record)), default=-1)
    return lambda record: record in records[last + 1 :]


def summary(tally: Tally) -> str:
    """Markdown: what became of the examples of each target."""
    titles = ["reader of", "examples", "read", "refused", *FAILURES.values(), "slowest"]
    columns = ("examples", "read", "refused", *FAILURES)
    sums, rows = tally.sums(), []
    sums["**all**"] = reduce(joined, sums.values(), Counter())
    for name, counts in sums.items():
        numbers = [f"{counts[column]:,}" for column in columns]
        rows.append([name, *numbers, f"{counts['slowest']:.1f} s"])
    after = reduce(joined, tally.sums(since_last_finding(tally)).values(), Counter())
    failures = sum(after[kind] for kind in FAILURES)
    return (
        f"{table(titles, rows)}\n\n{after['examples']:,} of them after the last finding was "
        f"mended: {failures} failures."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--target", help="this one only: repeat its example of --seed")
    parser.add_argument("--seed", type=int, help="of the first example (default: at random)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first = randbelow(2**31) << 20 if options.seed is None else options.seed
    tally = Tally("fuzz", first)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            targets = make_targets(folder / "seeds")
            if options.target is None:
                fuzz(targets, options.minutes, folder, tally)
            elif options.target not in targets:
                parser.error(f"--target: choose one of {', '.join(targets)}")
            else:
                read = example(targets[options.target], Random(first), folder / "example")
                print("read" if read else "refused")
    finally:
        if options.target is None:
            fill(DOCUMENT, "fuzzing", summary(tally))


if __name__ == "__main__":
    main()
