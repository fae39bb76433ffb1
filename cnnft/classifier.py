"""`Classifier`: what predict, evaluate and export take, from a run or from an exported file."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnft import __version__, distributed
from cnnft.acceleration import Compiled, choose_precision, place
from cnnft.batches import default_workers, view_batches
from cnnft.config import Head, Precision, TestTimeViews
from cnnft.errors import CnnftError, UsageError, first_line
from cnnft.files import parse_json
from cnnft.folding import folded
from cnnft.heads import head_tensors, replace_by_mlp
from cnnft.hub import Pin
from cnnft.inference import Ensemble, choose_device, infer
from cnnft.memory import largest_inference_batch
from cnnft.pretrained import backbone_hash, load_weights
from cnnft.transforms import VIEWS, EvaluationViews, InputSpec, Normalizing
from cnnft.zoo import CROP_MODE_OF_FIT, Identity, build, numbers_held, resolve, try_out

FORMAT = 1
"""Of the description below; raised when an older cnnft could not read it."""

SNAPSHOT = "snapshots/{}.safetensors"
"""In a run: the weights of each network that votes, from 1."""
_MOST_SNAPSHOTS = 1000


_HOLDS_ALL = "{} holds all its weights: --weights goes with a head file only"


@dataclass(frozen=True)
class Prediction:
    """What the classifier says about one file: classes in falling probability, or an error."""

    file: Path
    top: tuple[tuple[str, float], ...]
    """(class name, probability); empty where the file cannot be read."""
    error: str | None = None

    @property
    def label(self) -> str | None:
        return self.top[0][0] if self.top else None


@dataclass
class Classifier:
    """A network and all that its logits mean: class names, preprocessing, origin."""

    network: nn.Module
    classes: tuple[str, ...]
    """In the order of the logits."""
    input_spec: InputSpec
    identity: Identity
    head: frozenset[str]
    """Names of the head's tensors in the network's state dict."""
    head_kind: Head
    weights_source: str | None
    """Where the pretrained weights came from; None: there were none."""
    missing: tuple[str, ...]
    """Backbone tensors that the pretrained weights lacked: random when training began."""
    pretrained_hash: str
    """`backbone_hash` before training."""
    snapshots: int = 0
    """How many networks vote in `network`; 0: it is a single one."""
    pin: Pin | None = None
    """The file of the pretrained weights; None: there was none, or an older cnnft kept no pin."""

    def predict(
        self,
        images: str | Path | Sequence[str | Path],
        *,
        tta: TestTimeViews = "none",
        top: int | None = None,
        batch_size: int | Literal["auto"] = 32,
        workers: int | None = None,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> list[Prediction]:
        """One prediction per file, in order.

        Args:
            top: how many classes each holds (None: all).
            batch_size: images that are computed at once; auto: as many as fit and are quick.
            compile: with torch.compile first, which takes as long as some thousand images.
        """
        mine = self.stream(
            images,
            tta=tta,
            top=top,
            batch_size=batch_size,
            workers=workers,
            precision=precision,
            compile=compile,
        )
        return distributed.gather(list(mine))

    def stream(
        self,
        images: str | Path | Sequence[str | Path],
        *,
        tta: TestTimeViews = "none",
        top: int | None = None,
        batch_size: int | Literal["auto"] = 32,
        workers: int | None = None,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> Iterator[Prediction]:
        """`predict`, yielding as batches are done; of several processes each gives its share."""
        paths = [images] if isinstance(images, str | Path) else images
        if tta not in get_args(TestTimeViews):
            choices = ", ".join(get_args(TestTimeViews))
            raise UsageError(f"--tta {tta!r} is unknown: choose one of {choices}")
        for name, value in (("--top", top), ("--batch-size", batch_size)):
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name} {value} is out of range: it must be at least 1")
        top = min(top or len(self.classes), len(self.classes))
        workers = default_workers() if workers is None else workers
        network, size = self.network, self.input_spec.size
        device = next(network.parameters()).device
        precision = choose_precision(precision, device)
        if batch_size == "auto":
            batch_size = largest_inference_batch(network, size, VIEWS[tta])
        if len(paths) > batch_size:
            network = folded(network, size)
        else:  # one batch, for which neither that nor a worker is worth the time
            workers = 0
        if compile:
            network = Compiled(network)
        network = Normalizing(network, self.input_spec)
        views = EvaluationViews(self.input_spec, tta).as_bytes
        pinned = device.type == "cuda"
        batches = view_batches(paths, views, batch_size, workers, pinned=pinned)
        for batch, log_probs in infer(network, batches, precision):
            rows = dict(zip(batch.indices, log_probs, strict=True))
            for index in sorted([*batch.indices, *batch.unreadable]):
                if index in rows:
                    yield Prediction(Path(paths[index]), self._top(rows[index], top))
                else:
                    yield Prediction(Path(paths[index]), (), batch.unreadable[index])

    def _top(self, log_probs: Tensor, top: int) -> tuple[tuple[str, float], ...]:
        values, labels = log_probs.exp().topk(top)
        return tuple(
            (self.classes[label], value)
            for label, value in zip(labels.tolist(), values.tolist(), strict=True)
        )

    def logits(self, image: Image.Image) -> Tensor:
        """(C,) for one RGB image, preprocessed as in evaluation."""
        self.network.eval()
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            result: Tensor = self.network(EvaluationViews(self.input_spec)(image).to(device))[0]
        return result

    def describe(self) -> dict[str, Any]:
        """All but the tensors, as JSON values; timm reads what is outside "cnnft" too."""
        identity = self.identity.to_dict()
        config: dict[str, Any] = {
            "architecture": identity.pop("architecture"),
            "num_classes": len(self.classes),
            "model_args": identity.pop("model_args"),
            "pretrained_cfg": identity.pop("pretrained_cfg") | self._timm_config(),
        }
        config["cnnft"] = {
            "format": FORMAT,
            "version": __version__,
            "classes": list(self.classes),
            "input_spec": asdict(self.input_spec),
            "head": sorted(self.head),
            "head_kind": self.head_kind,
            "snapshots": self.snapshots,
            "backbone": {
                **identity,
                "weights_source": self.weights_source,
                "missing": list(self.missing),
                "sha256": self.pretrained_hash,
            },
            "weights_file": None if self.pin is None else asdict(self.pin),
        }
        return config

    def _timm_config(self) -> dict[str, Any]:
        # Not num_classes: this stays a description of the pretrained weights, which a head file
        # fetches again; timm takes the number of classes from the top of the file.
        spec = self.input_spec
        return {
            "label_names": list(self.classes),
            "input_size": [3, spec.size, spec.size],
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_fraction,
            "crop_mode": CROP_MODE_OF_FIT[spec.fit],
            "mean": list(spec.mean),
            "std": list(spec.std),
        }


def from_description(
    config: dict[str, Any], source: Path, state: Mapping[str, Tensor]
) -> Classifier:
    """The classifier that `Classifier.describe` described, with random weights.

    `state` is what will fill it, or its head alone.

    Raises:
        CnnftError: not such a description, one from a newer cnnft, or one of a larger network.
    """
    try:
        own = config["cnnft"]
        if own["format"] > FORMAT:
            raise CnnftError(
                f"{source} was written by cnnft {str(own['version'])[:20]}: update cnnft"
            )
        backbone = dict(own["backbone"])
        weights_source, pretrained_hash = backbone.pop("weights_source"), backbone.pop("sha256")
        missing = _texts(backbone.pop("missing"))
        identity = Identity(
            architecture=config["architecture"],
            model_args=config["model_args"],
            pretrained_cfg=config["pretrained_cfg"],
            **backbone,
        )
        values = own["input_spec"]
        statistics = {name: tuple(values[name]) for name in ("mean", "std")}
        spec = InputSpec(**values | statistics)
        classes = _texts(own["classes"])
        head, head_kind = frozenset(_texts(own["head"])), own.get("head_kind", "linear")
        if head_kind not in get_args(Head):
            raise ValueError("head_kind is unknown")
        snapshots = own.get("snapshots", 0)
        if not isinstance(snapshots, int) or not 0 <= snapshots <= _MOST_SNAPSHOTS:
            raise ValueError("the number of snapshots makes no sense")
        pin = Pin(**own["weights_file"]) if own.get("weights_file") else None
        if not isinstance(weights_source, str | None) or not isinstance(pretrained_hash, str):
            raise TypeError("the backbone's weights are no text")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CnnftError(
            f"{source} does not describe a cnnft classifier ({first_line(error)})"
        ) from error
    try:
        held, given = numbers_held(identity, len(classes)), sum(t.numel() for t in state.values())
        # `fill` compares exactly; this is so that no absurd network is made for it.
        if held > 2 * given and state.keys() != head:
            raise CnnftError(
                f"{source} does not fit the network it names: that holds {held:,} numbers, and "
                f"its weights are {given:,}"
            )
        network = build(identity, len(classes))
        if identity.model_args:  # some that make no sense show only when it computes
            try_out(network, spec.size)
        if head_kind == "mlp":
            replace_by_mlp(network, head_tensors(network, lambda other: build(identity, other)))
    except CnnftError:
        raise
    except Exception as error:  # whatever the library says of arguments that it does not know
        raise CnnftError(
            f"{source}: {identity.architecture} cannot be built ({first_line(error)})"
        ) from error
    return Classifier(
        network,
        classes,
        spec,
        identity,
        head,
        head_kind,
        weights_source,
        missing,
        pretrained_hash,
        snapshots,
        pin,
    )


def _texts(values: object) -> tuple[str, ...]:
    """Raises `ValueError`: no list of different names."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of names is none")
    if len(set(values)) != len(values):
        raise ValueError("a list of names has one twice")
    return tuple(values)


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
        classifier.network = voters(classifier, folder)
    return classifier


def voters(classifier: Classifier, folder: Path) -> Ensemble:
    """The networks of a run's snapshots."""
    networks = []
    for number in range(1, classifier.snapshots + 1):
        file = folder / SNAPSHOT.format(number)
        networks.append(copy.deepcopy(classifier.network))
        fill(networks[-1], read_tensors(file)[1], file)
    return Ensemble(networks)


def _load_file(path: Path, weights: str | Path | None) -> Classifier:
    metadata, state = read_tensors(path)
    if "cnnft" not in metadata:
        raise CnnftError(
            f"{path} is not a file that cnnft exported: give a run directory, or a file made by "
            "cnnft export"
        )
    classifier = from_description(parse_json(metadata["cnnft"], path), path, state)
    if state.keys() == classifier.head:
        source = weights if weights is not None else _file_of(classifier)
        if weights is None and source is not None and not Path(source).is_file():
            raise CnnftError(
                f"{path} was trained on {source}, which is not there any more: give the file with "
                "--weights FILE"
            )
        identity = classifier.identity
        if source is None:  # where to fetch them from is the library's to say, not the file's
            identity = replace(identity, pretrained_cfg=resolve(identity.name).pretrained_cfg)
        load_weights(classifier.network, classifier.head, identity, source)
        if backbone_hash(classifier.network, classifier.head) != classifier.pretrained_hash:
            raise CnnftError(
                f"{path} was trained on {classifier.weights_source}, and these weights of "
                f"{classifier.identity.architecture} differ: give the same with --weights FILE"
            )
        state = {**classifier.network.state_dict(), **state}
    elif weights is not None:
        raise UsageError(_HOLDS_ALL.format(path))
    fill(classifier.network, state, path)
    return classifier


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
        raise CnnftError(f"{path} is not a whole safetensors file ({first_line(error)})") from error


def fill(network: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Raises `CnnftError` where the tensors of the file `source` are another network's."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        details = str(error).partition("\n")[2]  # its first line says only that there was an error
        text = first_line(RuntimeError(details or error))
        raise CnnftError(f"{source} does not fit the network it names: {text}") from error
