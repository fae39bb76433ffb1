"""A run -> a file that can be taken elsewhere: the head alone, all weights, or ONNX."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnnft.config.choices import ExportFormat
from cnnft.data.images import ImageError, read_image
from cnnft.errors import CnnftError, UsageError
from cnnft.inference.classifier import Classifier
from cnnft.inference.description import describe
from cnnft.inference.storage import load
from cnnft.machine.files import to_safetensors, write_whole
from cnnft.models.surgery.divide import divided
from cnnft.models.weights import backbone_hash
from cnnft.runs.run import FILES, Run

_log = logging.getLogger(__name__)

SUFFIX: dict[ExportFormat, str] = {
    "head": ".head.safetensors",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
}

ONNX_TOLERANCE = 1e-4
"""Largest difference between PyTorch's and onnxruntime's probabilities on the checked images."""
ONNX_IMAGES = 8


def export_model(
    folder: str | Path, format: ExportFormat, output: str | Path | None = None
) -> Path:
    """Write the classifier of a run as one file; returns its path (default: <run>/<run><suffix>).

    The folder of a model alone, without the rest of a run, serves too.

    Raises:
        UsageError: no such run; the output is a folder, or a head is asked of a model that has
            none of its own.
        CnnftError: the run is not finished, or the ONNX file disagrees with PyTorch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run")
    classifier = load(folder, device="cpu")
    path = Path(output) if output else folder / (folder.resolve().name + SUFFIX[format])
    if path.resolve() in {(folder / name).resolve() for name in FILES}:
        raise UsageError(f"--output {path} is one of the run's own files: choose another name")
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder: give the file to write")
    if classifier.is_ensemble and format != "onnx":
        networks = classifier.snapshots or 1 + len(classifier.members)
        raise UsageError(
            f"{folder} is an ensemble of {networks} networks, which only --format onnx puts into "
            "one file"
        )
    writers: dict[ExportFormat, Callable[[], bytes]] = {
        "head": lambda: _head(classifier, folder),
        "safetensors": lambda: _whole(classifier),
        "onnx": lambda: _onnx(classifier, folder),
    }
    write_whole(path, writers[format]())
    return path


def _head(classifier: Classifier, folder: Path) -> bytes:
    way_out = f"use: cnnft export {folder} --format safetensors"
    if classifier.weights_source is None:
        raise UsageError(f"{folder} has a random backbone, which exists nowhere else: {way_out}")
    if classifier.missing:
        raise UsageError(
            f"{len(classifier.missing)} backbone tensors of {folder}, such as "
            f"{classifier.missing[0]}, were not in the weights file and are random: {way_out}"
        )
    if backbone_hash(classifier.network, classifier.head) != classifier.pretrained_hash:
        raise UsageError(
            f"{folder} trained its backbone too, so the head alone would not be enough: {way_out}"
        )
    state = classifier.network.state_dict()
    head = {name: state[name] for name in sorted(classifier.head)}
    return to_safetensors(head, _metadata(classifier))


def _whole(classifier: Classifier) -> bytes:
    """Other programs read it too, which know no temperature: the last layer's weights have it."""
    if classifier.temperature != 1:
        size = classifier.input_spec.size
        network = divided(classifier.network, classifier.head, classifier.temperature, size)
        if network is None:
            _log.warning(
                "the logits of %s are not the output of a linear layer: programs other than cnnft "
                "have to divide them by the temperature %.4g",
                *(classifier.identity.architecture, classifier.temperature),
            )
        else:
            classifier = replace(classifier, network=network, temperature=1.0)
    return to_safetensors(classifier.network.state_dict(), _metadata(classifier))


def _metadata(classifier: Classifier) -> dict[str, str]:
    return {"cnnft": json.dumps(describe(classifier), ensure_ascii=False)}


def _onnx(classifier: Classifier, folder: Path) -> bytes:
    """normalised pixels (B, 3, H, W) -> logits (B, C), any B; checked before it is returned."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it and names it only in a traceback
    except ImportError as error:
        raise CnnftError(
            f"--format onnx needs the package {error.name}: pip install 'cnnft[onnx]'"
        ) from error
    what, pixels = _example_pixels(classifier, folder)
    try:
        program = torch.onnx.export(
            classifier.calibrated(classifier.network),
            (pixels[:2],),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise CnnftError(
            f"PyTorch cannot express {classifier.identity.architecture} as ONNX ({reason}); use "
            "--format safetensors"
        ) from error
    assert program is not None
    model = program.model_proto
    # Its graph has the temperature in it, and all members.
    described = replace(classifier, temperature=1.0, members=())
    onnx.helper.set_model_props(model, _metadata(described))
    content: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = classifier.forward(pixels).softmax(dim=1)
    (logits,) = session.run(None, {"pixels": pixels.numpy()})
    difference = float((torch.from_numpy(logits).softmax(dim=1) - expected).abs().max())
    if not difference <= ONNX_TOLERANCE:
        raise CnnftError(
            f"the ONNX file disagrees with PyTorch by {difference:.2g} in probability on "
            f"{len(pixels)} {what}, so it is not written; use --format safetensors"
        )
    return content


def _example_pixels(classifier: Classifier, folder: Path) -> tuple[str, torch.Tensor]:
    """(what they are, pixels (N, 3, H, W) with 2 <= N <= ONNX_IMAGES): images of the run,
    preprocessed; where they are gone, generated ones of several spatial frequencies.
    """
    try:
        found = list(islice(_images_of(folder), ONNX_IMAGES))
        problem = f"the images of {folder} are gone (see its data.csv)"
    except CnnftError as error:
        found, problem = [], str(error)
    what = "images of the run"
    if len(found) < 2:
        _log.warning("%s: the ONNX file is checked on generated pixels", problem)
        random, what = np.random.default_rng(0), "generated images"
        sides = [4 * 2**n for n in range(ONNX_IMAGES)]
        noise = [random.integers(0, 256, (side, side, 3), np.uint8) for side in sides]
        found = [Image.fromarray(pixels) for pixels in noise]
    return what, torch.stack([classifier.preprocess(image) for image in found])


def _images_of(folder: Path) -> Iterator[Image.Image]:
    """Raises `CnnftError` where nothing says which images it was trained on."""
    if not Run.is_run(folder):
        raise CnnftError(f"{folder} does not say which images it was trained on")
    splits = Run.open(folder).dataset().splits
    for path in (*splits["val"].paths, *splits["train"].paths):
        with suppress(ImageError):  # moved since; others will do
            yield read_image(path)
