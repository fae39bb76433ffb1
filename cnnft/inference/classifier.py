"""`Classifier`: a network and all that its logits mean; what predict, evaluate and export take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cnnft.config.choices import Head
from cnnft.data.transforms import EvaluationViews, InputSpec
from cnnft.errors import UsageError
from cnnft.inference.predict import Calibrated, Ensemble, Inference, predict_files
from cnnft.machine import distributed
from cnnft.models.freezing import evaluating
from cnnft.models.hub import Pin
from cnnft.models.identity import Identity
from cnnft.models.surgery.embed import Embed, find_embedding


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


@dataclass(frozen=True)
class Member:
    """Another classifier of an ensemble."""

    folder: str
    """Where it lies in the run, as a run."""
    weight: float
    """Of its probabilities in the mean."""


@dataclass(kw_only=True)
class Description:
    """All of a classifier but its network."""

    classes: tuple[str, ...]
    """In the order of the logits."""
    input_spec: InputSpec
    identity: Identity
    head: frozenset[str]
    """Names of the head's tensors in the network's state dict."""
    head_kind: Head
    stages: tuple[str, ...] = ()
    """Paths of the modules whose pooled outputs enter the head beside the last layer's."""
    weights_source: str | None
    """Where the pretrained weights came from; None: there were none."""
    missing: tuple[str, ...]
    """Backbone tensors that the pretrained weights lacked: random when training began."""
    pretrained_hash: str
    """`backbone_hash` before training."""
    temperature: float = 1.0
    """What logits are divided by before they are probabilities (Guo et al., 2017)."""
    snapshots: int = 0
    """How many networks a snapshot ensemble has; 0: it is a single one."""
    members: tuple[Member, ...] = ()
    """Others, whose probabilities are averaged with its own, which have the weight that is left."""
    pin: Pin | None = None
    """The file of the pretrained weights; None: there was none, or an older cnnft kept no pin."""


@dataclass(kw_only=True)
class Classifier(Description):
    """A network and all that its logits mean: class names, preprocessing, origin."""

    network: nn.Module
    _embed: Embed | None = field(default=None, init=False, repr=False)

    @property
    def is_ensemble(self) -> bool:
        """Of several networks, whose probabilities are averaged."""
        return bool(self.snapshots or self.members)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def preprocess(self, image: Image.Image) -> Tensor:
        """(3, H, W) of an RGB image, as evaluation sees it, on the CPU."""
        return EvaluationViews(self.input_spec)(image)[0]

    def calibrated(self, network: nn.Module) -> nn.Module:
        """`network`, which gives the logits of this one's, with its temperature."""
        if self.temperature == 1:
            return network
        return Calibrated(network, self.temperature).train(network.training)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C), in evaluation, of calibrated probabilities; gradients flow
        to the pixels.
        """
        with evaluating(self.network):
            logits: Tensor = self.calibrated(self.network)(pixels.to(self.device))
        return logits

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, D), what enters the head; gradients flow to the pixels.

        Maps and tokens are averaged; of several heads (distilled networks) the mean of what enters
        each. Of a snapshot ensemble, the features of all its networks, concatenated; of another
        ensemble, those of the run's own network.
        """
        network = self.network
        networks = list(network.networks) if isinstance(network, Ensemble) else [network]
        if self.members:
            first = networks[0]
            networks = [first.network if isinstance(first, Calibrated) else first]
        if self._embed is None:
            self._embed = find_embedding(networks[0], self.head, self.input_spec.size)
        with evaluating(network):
            features = [self._embed(one, pixels.to(self.device)) for one in networks]
        return torch.cat(features, dim=1)

    def predict(
        self, images: str | Path | Sequence[str | Path], *, top: int | None = None, **options: Any
    ) -> list[Prediction]:
        """One prediction per file, in order.

        Args:
            top: how many classes each holds (None: all).
            options: fields of `Inference`, such as tta="hflip".
        """
        mine = self.stream(images, top=top, **options)
        return distributed.gather(list(mine))

    def stream(
        self, images: str | Path | Sequence[str | Path], *, top: int | None = None, **options: Any
    ) -> Iterator[Prediction]:
        """`predict`, yielding as batches are done; each of several processes gives its shard."""
        paths = [images] if isinstance(images, str | Path) else images
        if not isinstance(paths, Sequence) or any(not isinstance(p, str | Path) for p in paths):
            raise UsageError(
                "predict takes files: give their paths, or for an image in memory call "
                "forward(preprocess(image)[None])"
            )
        if top is not None and top < 1:
            raise UsageError(f"--top {top} is out of range: it must be at least 1")
        top = min(top or len(self.classes), len(self.classes))
        for batch, logits in predict_files(self, paths, Inference(**options)):
            rows = dict(zip(batch.indices, logits.softmax(dim=1), strict=True))
            for index in sorted([*batch.indices, *batch.unreadable]):
                if index in rows:
                    yield Prediction(Path(paths[index]), self._top(rows[index], top))
                else:
                    yield Prediction(Path(paths[index]), (), batch.unreadable[index])

    def _top(self, probabilities: Tensor, top: int) -> tuple[tuple[str, float], ...]:
        values, labels = probabilities.topk(top)
        return tuple(
            (self.classes[label], value)
            for label, value in zip(labels.tolist(), values.tolist(), strict=True)
        )
