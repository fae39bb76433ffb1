"""A run -> a file that can be taken elsewhere: the head alone, all weights, or ONNX."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from cnnft.config.choices import ExportFormat
from cnnft.data.images import ImageError, read_image
from cnnft.errors import CnnftError, UsageError
from cnnft.inference.classifier import Classifier
from cnnft.inference.description import describe
from cnnft.inference.storage import load
from cnnft.machine.files import to_safetensors, write_whole
from cnnft.models.weights import backbone_hash
from cnnft.runs.run import FILES, Run

SUFFIX: dict[ExportFormat, str] = {
    "head": ".head.safetensors",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
}

ONNX_TOLERANCE = 1e-4
"""Largest difference between PyTorch's and onnxruntime's probabilities on the checked images."""
ONNX_IMAGES = 8


def export_run(run: Run, format: ExportFormat, output: str | Path | None = None) -> Path:
    """Write the run's classifier as one file; returns its path (default: <run>/<run><suffix>).

    Raises:
        UsageError: the output is a folder, or a head is asked of a run that has none of its own.
        CnnftError: the run is not finished, or the ONNX file disagrees with PyTorch.
    """
    classifier = load(run.path, device="cpu")
    path = Path(output) if output else run.path / (run.path.resolve().name + SUFFIX[format])
    if path.resolve() in {(run.path / name).resolve() for name in FILES}:
        raise UsageError(f"--output {path} is one of the run's own files: choose another name")
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder: give the file to write")
    if classifier.snapshots and format != "onnx":
        raise UsageError(
            f"{run.path} is {classifier.snapshots} networks that vote, which only --format onnx "
            "puts into one file"
        )
    writers: dict[ExportFormat, Callable[[], bytes]] = {
        "head": lambda: _head(classifier, run),
        "safetensors": lambda: _whole(classifier),
        "onnx": lambda: _onnx(classifier, run),
    }
    write_whole(path, writers[format]())
    return path


def _head(classifier: Classifier, run: Run) -> bytes:
    way_out = f"use: cnnft export {run.path} --format safetensors"
    if classifier.weights_source is None:
        raise UsageError(f"{run.path} has a random backbone, which exists nowhere else: {way_out}")
    if classifier.missing:
        raise UsageError(
            f"{len(classifier.missing)} backbone tensors of {run.path}, such as "
            f"{classifier.missing[0]}, were not in the weights file and are random: {way_out}"
        )
    if backbone_hash(classifier.network, classifier.head) != classifier.pretrained_hash:
        raise UsageError(
            f"{run.path} trained its backbone too, so the head alone would not be enough: {way_out}"
        )
    state = classifier.network.state_dict()
    head = {name: state[name] for name in sorted(classifier.head)}
    return to_safetensors(head, _metadata(classifier))


def _whole(classifier: Classifier) -> bytes:
    return to_safetensors(classifier.network.state_dict(), _metadata(classifier))


def _metadata(classifier: Classifier) -> dict[str, str]:
    return {"cnnft": json.dumps(describe(classifier), ensure_ascii=False)}


def _onnx(classifier: Classifier, run: Run) -> bytes:
    """normalised pixels (B, 3, H, W) -> logits (B, C), any B; checked before it is returned."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it and names it only in a traceback
    except ImportError as error:
        raise CnnftError(
            f"--format onnx needs the package {error.name}: pip install 'cnnft[onnx]'"
        ) from error
    pixels = _real_pixels(classifier, run)
    try:
        program = torch.onnx.export(
            classifier.network,
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
    onnx.helper.set_model_props(model, _metadata(classifier))
    content: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = classifier.forward(pixels).softmax(dim=1)
    (logits,) = session.run(None, {"pixels": pixels.numpy()})
    difference = float((torch.from_numpy(logits).softmax(dim=1) - expected).abs().max())
    if not difference <= ONNX_TOLERANCE:
        raise CnnftError(
            f"the ONNX file disagrees with PyTorch by {difference:.2g} in probability on "
            f"{len(pixels)} images of the run, so it is not written; use --format safetensors"
        )
    return content


def _real_pixels(classifier: Classifier, run: Run) -> torch.Tensor:
    """Some of the run's validation images, preprocessed: (N, 3, H, W), 2 <= N <= ONNX_IMAGES."""
    found = []
    for path in run.files("val") + run.files("train"):
        try:
            found.append(classifier.preprocess(read_image(path)))
        except ImageError:
            continue  # moved since; others will do
        if len(found) == ONNX_IMAGES:
            break
    if len(found) < 2:
        raise CnnftError(
            f"the images of {run.path} are gone (see its data.csv), and an ONNX file is not "
            "written unchecked: bring them back, or use --format safetensors"
        )
    return torch.stack(found)
