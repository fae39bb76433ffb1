"""A classifier on disk: a run directory or an exported file."""

import copy
import os
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.inference.classifier import Classifier
from cnnft.inference.description import from_description
from cnnft.inference.predict import Ensemble
from cnnft.machine.devices import choose_device, place
from cnnft.machine.files import kind_of_file, parse_json
from cnnft.models.registry import resolve
from cnnft.models.weights import backbone_hash, load_weights

SNAPSHOT = "snapshots/{}.safetensors"
"""In a run: the weights of each network of a snapshot ensemble, from 1."""

_HOLDS_ALL = "{} holds all its weights: --weights goes with a head file only"


def load(
    model: str | Path, *, weights: str | Path | None = None, device: str = "auto"
) -> Classifier:
    """Open a run directory, or a file made by `export`, as a classifier ready to predict.

    Args:
        weights: for a head file, where to take its backbone's weights from (default: where they
            came from in training).

    Raises:
        UsageError: nothing is there.
        CnnftError: it cannot be read, or the backbone is not the one that the head was trained on.
    """
    path = require_model(model)
    chosen = choose_device(device)
    classifier = _load_run(path, weights) if path.is_dir() else _load_file(path, weights)
    place(classifier.network, chosen).eval()
    return classifier


def require_model(model: str | Path) -> Path:
    """Raises `UsageError` where there is nothing that `load` could open."""
    path = Path(model)
    if not str(model) or not path.exists():
        raise UsageError(f"{str(model) or '(empty)'}: no such run or exported file")
    if path.suffix == ".onnx":
        raise UsageError(
            f"{path} is for programs that run ONNX: give the run that it was made from"
        )
    return path


def _load_run(folder: Path, weights: str | Path | None) -> Classifier:
    if weights is not None:
        raise UsageError(_HOLDS_ALL.format(folder))
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise CnnftError(f"{folder} is not a finished run: it has no {file.name}")
    config = parse_json(config_file.read_bytes(), config_file)
    _, state = read_tensors(weights_file)
    classifier = from_description(config, config_file, state)
    fill(classifier.network, state, weights_file)
    if classifier.snapshots:
        classifier.network = snapshot_ensemble(classifier, folder)
    if classifier.members:
        _add_members(classifier, folder)
    return classifier


def _add_members(classifier: Classifier, folder: Path) -> None:
    """Make its network that of all."""
    networks, weights = [classifier.calibrated(classifier.network)], []
    for member in classifier.members:
        other = _load_run(folder / member.folder, None)
        if (other.classes, other.input_spec) != (classifier.classes, classifier.input_spec):
            raise CnnftError(f"{folder / member.folder} is not of the ensemble: its images differ")
        networks.append(other.calibrated(other.network))
        weights.append(member.weight)
    classifier.network = Ensemble(networks, [1 - sum(weights), *weights])
    classifier.temperature = 1.0  # each has its own


def snapshot_ensemble(classifier: Classifier, folder: Path) -> Ensemble:
    """The networks of a run's snapshots."""
    networks = []
    for number in range(1, classifier.snapshots + 1):
        file = folder / SNAPSHOT.format(number)
        networks.append(copy.deepcopy(classifier.network))
        fill(networks[-1], read_tensors(file)[1], file)
    return Ensemble(networks)


def _load_file(path: Path, weights: str | Path | None) -> Classifier:
    if kind := kind_of_file(path):
        raise CnnftError(
            f"{path} is no model, it is {kind}: give a run directory, or a file made by cnnft "
            "export"
        )
    metadata, state = read_tensors(path)
    if "cnnft" not in metadata:
        raise CnnftError(
            f"{path} is not a file that cnnft exported: give a run directory, or a file made by "
            "cnnft export"
        )
    classifier = from_description(parse_json(metadata["cnnft"], path), path, state)
    if state.keys() == classifier.head:
        _load_backbone(classifier, path, weights)
        state = {**classifier.network.state_dict(), **state}
    elif weights is not None:
        raise UsageError(_HOLDS_ALL.format(path))
    fill(classifier.network, state, path)
    return classifier


def _load_backbone(classifier: Classifier, path: Path, weights: str | Path | None) -> None:
    """The weights that the head file `path` was trained on, from `weights` or where they were.

    Raises:
        CnnftError: they are not there any more, or are others.
    """
    source = weights if weights is not None else _file_of(classifier)
    if weights is None and source is not None and not os.path.isfile(source):  # noqa: PTH113  # Path's raises where a name is too long
        raise CnnftError(
            f"{path} was trained on {source}, which is not there any more: give the file with "
            "--weights FILE"
        )
    identity = classifier.identity
    if source is None:  # where to fetch them from is the library's to say, not the file's
        identity = replace(identity, pretrained_cfg=resolve(identity.name).pretrained_cfg)
    way_out = "give --weights FILE" if weights is None else "leave out --weights, or give the same"
    differ = CnnftError(
        f"{path} was trained on {classifier.weights_source}, and these weights differ: {way_out}"
    )
    try:
        load_weights(classifier.network, classifier.head, identity, source)
    except UsageError:
        raise
    except CnnftError as error:
        raise error if weights is None else differ from error
    if backbone_hash(classifier.network, classifier.head) != classifier.pretrained_hash:
        raise differ


def _file_of(classifier: Classifier) -> str | None:
    """The local file that the pretrained weights came from, if it was one."""
    source = classifier.weights_source
    return None if source in (None, classifier.identity.name) else source


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        kind = kind_of_file(path)
        reason = f"it is {kind}" if kind else first_line(error)
        raise CnnftError(f"{path} is not a whole safetensors file ({reason})") from error


def fill(network: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Raises `CnnftError` where the tensors of the file `source` are another network's."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        details = str(error).partition("\n")[2]  # its first line says only that there was an error
        text = first_line(RuntimeError(details or error))
        raise CnnftError(f"{source} does not fit the network it names: {text}") from error
