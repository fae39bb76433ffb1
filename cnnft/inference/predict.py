"""Images -> logits, in one place.

predict, evaluate, validation, teachers and export checks call it, so they cannot differ.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cnnft.config.choices import Precision
from cnnft.config.texts import view_count
from cnnft.data.dataset import Samples
from cnnft.data.loading import Loading, Views, view_batches, worker_count
from cnnft.data.threads import READ_TIMEOUT
from cnnft.data.transforms import Normalizing
from cnnft.data.viewsets import ViewSet
from cnnft.errors import CnnftError, UsageError
from cnnft.inference.predictions import Predictions, Role
from cnnft.machine import distributed
from cnnft.machine.devices import Compiled, autocast, choose_precision, float32_at_least
from cnnft.models.surgery.fold import folded

if TYPE_CHECKING:
    from cnnft.inference.classifier import Classifier

_AUTO = {"cuda": 256, "cpu": 32}
"""Views in a batch with --batch-size auto; more are not faster (docs/speed.md)."""
_MOST_VIEWS = 10
"""Of an image, for a batch to hold --batch-size images; where there are more it holds fewer."""


class NotANumberError(CnnftError):
    """The network's output is NaN."""


@dataclass(frozen=True)
class Inference:
    """How images are predicted.

    Raises:
        UsageError: there are no such views, or the batch size is no number of images.
    """

    tta: str = "none"
    """See `ViewSet`."""
    batch_size: int | Literal["auto"] = 32
    """Images that are computed at once. An image's logits depend on how many images its batch holds
    (in the last digits: kernels add in another order), and on nothing else about the others."""
    workers: int | None = None
    """None: half of the processors, at most 8."""
    precision: Precision = "float32"
    compile: bool = False
    """torch.compile, which takes as long as predicting some thousand images."""
    read_timeout: float = READ_TIMEOUT
    """Seconds to wait for images."""

    def __post_init__(self) -> None:
        view_count(self.tta)
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise UsageError(
                f"--batch-size {self.batch_size} is out of range: it must be at least 1"
            )

    def loading(self, device: torch.device, images: int) -> Loading:
        views = view_count(self.tta)
        if self.batch_size == "auto":
            size = max(_AUTO.get(device.type, _AUTO["cpu"]) // views, 1)
        else:
            size = max(self.batch_size * _MOST_VIEWS // max(views, _MOST_VIEWS), 1)
        workers = worker_count(self.workers)
        if images <= size:  # one batch is not worth the start of a worker
            workers = 0
        return Loading(size, workers, device.type == "cuda", self.read_timeout)


def predict_files(
    classifier: "Classifier", paths: Sequence[str | Path], inference: Inference
) -> Iterator[tuple[Views, Tensor]]:
    """Yields batches of this process's shard as they are done: see `predict_batches`.

    BatchNorm is folded however few the files are, so that the same batch gives the same bits
    whatever else is predicted, by however many workers.
    """
    device = classifier.device
    precision = choose_precision(inference.precision, device)
    network = folded(classifier.network, classifier.input_spec.size)
    if inference.compile:
        network = Compiled(network)
    views = ViewSet(classifier.input_spec, inference.tta).as_bytes
    batches = view_batches(paths, views, inference.loading(device, len(paths)))
    network = classifier.calibrated(Normalizing(network, classifier.input_spec))
    return predict_batches(network, batches, precision)


def predict(
    classifier: "Classifier",
    samples: Samples,
    inference: Inference,
    role: Role,
    on_image: Callable[[], object] = lambda: None,
) -> Predictions:
    """All samples, each exactly once, in their order; `on_image` is called once for each.

    Raises:
        CnnftError: a file cannot be read.
    """
    batches = predict_files(classifier, samples.paths, inference)
    return Predictions(samples, collect(batches, samples.paths, on_image), role)


def collect(
    batches: Iterable[tuple[Views, Tensor]],
    paths: Sequence[str | Path],
    on_image: Callable[[], object] = lambda: None,
) -> Tensor:
    """(N, C) logits of all `paths`, from the batches of all processes.

    Raises:
        CnnftError: a file cannot be read.
    """
    rows: list[Tensor] = []
    for batch, logits in batches:
        for index, reason in batch.unreadable.items():
            raise CnnftError(f"{paths[index]} {reason}: the data changed meanwhile")
        rows.append(logits)
        for _ in batch.indices:
            on_image()
    return torch.cat(distributed.gather(rows))


def predict_batches(
    network: nn.Module, batches: Iterable[Views], precision: Precision = "float32"
) -> Iterator[tuple[Views, Tensor]]:
    """Yields each batch with its logits (B, C) on the CPU; B counts the readable images, in the
    order of `batch.indices`. Of several views they are the log of the mean softmax probability.

    A batch is read when the next one has been begun, so that a GPU need not wait for its reader.
    """
    network.eval()
    compute = _Compute(network, precision)
    before: tuple[Views, Tensor] | None = None
    for batch in batches:
        present = batch, compute(batch.pixels)
        if before is not None:
            yield _read(*before)
        before = present
    if before is not None:
        yield _read(*before)


class _Compute:
    """(B, V, 3, H, W) -> (B, C); in smaller parts from the first out-of-memory error on."""

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self.network, self.precision = network, precision
        self.device = next(network.parameters()).device
        self.at_once: int | None = None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor | None) -> Tensor:
        if pixels is None:
            return torch.empty(0, 0)
        images, views = pixels.shape[:2]
        logits = self._all(pixels.flatten(0, 1))
        if views == 1:
            return logits
        log_probs = logits.log_softmax(dim=1).unflatten(0, (images, views))
        return log_probs.logsumexp(dim=1) - math.log(views)

    def _all(self, pixels: Tensor) -> Tensor:
        while True:
            size = self.at_once or len(pixels)
            try:
                return torch.cat([self._some(part) for part in pixels.split(size)])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.at_once = (min(size, len(pixels)) + 1) // 2
            torch.cuda.empty_cache()  # not before the exception is gone, which holds tensors

    def _some(self, pixels: Tensor) -> Tensor:
        with autocast(self.precision, self.device):
            return float32_at_least(self.network(pixels.to(self.device, non_blocking=True)))


def _read(batch: Views, logits: Tensor) -> tuple[Views, Tensor]:
    return batch, require_numbers(logits.cpu())


def require_numbers(outputs: Tensor) -> Tensor:
    """`outputs`; raises `NotANumberError` where one is NaN."""
    if outputs.isnan().any():
        raise NotANumberError(
            "the network gives no numbers (NaN): its weights are damaged, or it diverged"
        )
    return outputs


class Calibrated(nn.Module):
    """A network whose logits (B, C) are divided by a temperature."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, pixels: Tensor) -> Tensor:
        return float32_at_least(self.network(pixels)) / self.temperature


class Ensemble(nn.Module):
    """Networks whose probabilities are averaged: the log of the mean softmax, (B, C)."""

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float] = ()) -> None:
        """`weights` of the mean, one in sum; without them all are equal."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.weights = list(weights) or [1 / len(networks)] * len(networks)

    def forward(self, pixels: Tensor) -> Tensor:
        return mean_probability([network(pixels) for network in self.networks], self.weights)


def mean_probability(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The log of the weighted mean of softmax probabilities; each (B, C)."""
    log_probs = [
        float32_at_least(of).log_softmax(dim=1) + math.log(weight)
        for of, weight in zip(logits, weights, strict=True)
    ]
    return torch.stack(log_probs).logsumexp(dim=0)
