"""Two runs -> what differs between them: settings, images, network, versions, and the scores."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cnnft.inference.predictions import Predictions
from cnnft.metrics import mcnemar, tango_interval
from cnnft.runs.run import Run
from cnnft.runs.scores import Metrics

_PLACES = ("name", "runs_dir")
"""Settings that say where a run is kept, not what it is."""

_SPLITS = ("train", "val")

Rows = dict[str, tuple[Any, Any]]
"""What differs: name -> (first run's, second run's), None where there is none or none is known."""


@dataclass(frozen=True)
class Change:
    """An image that both runs used, by content, in another split or under another class."""

    file: tuple[str, str]
    split: tuple[str, str]
    label: tuple[str, str]


@dataclass(frozen=True)
class DataDifference:
    """By content: where the files lie and what they are called makes no difference."""

    n: tuple[dict[str, int], dict[str, int]]
    """Images of each split, of the first run and of the second."""
    only: tuple[dict[str, int], dict[str, int]]
    """Those that the other run has in neither split."""
    changed: tuple[Change, ...]

    @property
    def any(self) -> bool:
        return bool(self.changed) or any(count for of in self.only for count in of.values())


@dataclass(frozen=True)
class Paired:
    """Both runs on the validation images that they share: same content, same class."""

    n: int
    not_shared: tuple[int, int]
    """Validation images of the first and of the second run that are not among the n."""
    correct: tuple[int, int]
    only: tuple[int, int]
    """Images that the first run alone classifies right, and the second alone."""
    same: bool
    """Whether both predict the same class of every image, right or wrong."""

    @property
    def difference(self) -> float:
        """The second's accuracy minus the first's."""
        return (self.only[1] - self.only[0]) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Tango's score method."""
        return tango_interval(*self.only, self.n)

    @property
    def p(self) -> float:
        """Exact McNemar: of a difference at least as large if both were equally good."""
        return mcnemar(*self.only)


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs; an empty `Rows` says that nothing does."""

    settings: Rows
    data: DataDifference
    network: Rows
    """Architecture, pretrained weights, preprocessing: as they were, whatever the settings say."""
    versions: Rows | None
    """None: unknown, because a run was made before runs kept them."""
    metrics: tuple[Metrics, Metrics]
    paired: Paired | None
    """None: no image is shared, or a run was made before runs kept their predictions."""
    unknown: dict[str, list[str]]
    """Of "versions" and "predictions": the runs that were made before runs kept them."""


def compare(a: Run, b: Run) -> Comparison:
    """What differs between two runs that have finished an epoch.

    Raises:
        CnnftError: a file of a run is missing or damaged.
    """
    metrics = a.metrics(), b.metrics()
    data = _data(a, b)
    settings = _differing(a.config().to_dict(), b.config().to_dict())
    for name in (*_PLACES, *(() if data.any else ("data",))):
        settings.pop(name, None)
    environments = a.environment(), b.environment()
    predictions = a.predictions(), b.predictions()
    kept = {"versions": environments, "predictions": predictions}
    unknown = {
        name: [str(run.path) for run, value in zip((a, b), values, strict=True) if value is None]
        for name, values in kept.items()
    }
    return Comparison(
        settings=settings,
        data=data,
        network=_differing(_network(a), _network(b)),
        versions=None if unknown["versions"] else _differing(*(of or {} for of in environments)),
        metrics=metrics,
        paired=_paired(*predictions),
        unknown=unknown,
    )


def _differing(a: dict[str, Any], b: dict[str, Any]) -> Rows:
    names = dict.fromkeys([*a, *b])
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


class _Use(NamedTuple):
    """What a run made of an image."""

    sha256: str
    split: str
    label: str


def _data(a: Run, b: Run) -> DataDifference:
    files_a, files_b = _files(a), _files(b)
    used_a, used_b = (Counter({use: len(f) for use, f in of.items()}) for of in (files_a, files_b))
    left: defaultdict[str, list[_Use]] = defaultdict(list)
    for use in (used_b - used_a).elements():
        left[use.sha256].append(use)
    changed, only_a = [], Counter[str]()
    for use in (used_a - used_b).elements():
        if left[use.sha256]:
            other = left[use.sha256].pop()
            files = files_a[use][0], files_b[other][0]
            changed.append(Change(files, (use.split, other.split), (use.label, other.label)))
        else:
            only_a[use.split] += 1
    only_b = Counter(use.split for rest in left.values() for use in rest)
    return DataDifference(
        n=(
            _counts(use.split for use in used_a.elements()),
            _counts(use.split for use in used_b.elements()),
        ),
        only=(_counts(only_a.elements()), _counts(only_b.elements())),
        changed=tuple(changed),
    )


def _files(run: Run) -> dict[_Use, list[str]]:
    files = defaultdict(list)
    for split, samples in run.dataset().splits.items():
        rows = zip(samples.paths, samples.hashes, samples.labels, strict=True)
        for path, digest, label in rows:
            files[_Use(digest, split, samples.classes[label])].append(path)
    return files


def _counts(splits: Iterable[str]) -> dict[str, int]:
    return dict.fromkeys(_SPLITS, 0) | Counter(splits)


def _network(run: Run) -> dict[str, Any]:
    """What the description says of the network before training, flat."""
    described = run.description()
    identity, pin = described.identity, described.pin
    return {
        "architecture": identity.architecture,
        "model_args": identity.model_args,
        "classes": described.classes,
        "head": described.head_kind,
        "head on stages": described.stages,
        "backbone": identity.name,
        "backbone sha256": described.pretrained_hash,
        "weights": described.weights_source,
        **{f"weights {key}": value for key, value in (asdict(pin) if pin else {}).items()},
        **asdict(described.input_spec),
    }


def _paired(a: Predictions | None, b: Predictions | None) -> Paired | None:
    """Paired by content and class; copies of one file count once: they tell nothing new."""
    if a is None or b is None:
        return None
    one, other = _answers(a), _answers(b)
    shared = one.keys() & other.keys()
    if not shared:
        return None
    right = [{key for key in shared if of[key] == key[1]} for of in (one, other)]
    return Paired(
        n=len(shared),
        not_shared=(len(one) - len(shared), len(other) - len(shared)),
        correct=(len(right[0]), len(right[1])),
        only=(len(right[0] - right[1]), len(right[1] - right[0])),
        same=all(one[key] == other[key] for key in shared),
    )


def _answers(predictions: Predictions) -> dict[tuple[str, str], str]:
    """(content, class) -> predicted class."""
    samples = predictions.samples
    rows = zip(samples.hashes, samples.labels, predictions.predicted.tolist(), strict=True)
    return {
        (digest, samples.classes[label]): samples.classes[answer] for digest, label, answer in rows
    }
