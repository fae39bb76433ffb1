"""The linear probe: its solver against scikit-learn, and features that must not decide."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cross_entropy

from cnnft import Config
from cnnft.data.dataset import Samples
from cnnft.inference.calibrate import calibrate
from cnnft.metrics import calibration_error
from cnnft.probe.folds import assign_folds
from cnnft.probe.solve import Linear, Path, Solved, cross_validate, fit, solve
from cnnft.training.losses import balanced_weights
from cnnft.training.plan import prepare


def features(counts: tuple[int, ...], width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([label for label, n in enumerate(counts) for _ in range(n)])
    centers = torch.randn(len(counts), width, generator=generator)
    return centers[labels] + torch.randn(len(labels), width, generator=generator), labels


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_weights_are_those_of_scikit_learn(balanced: bool, strength: float):
    values, labels = features((40, 10, 5))
    x = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
    weights = balanced_weights((40, 10, 5)) if balanced else None
    found = fit(values[None], labels, 3, strength, weights)
    # Its penalty is 1 / (2 C) on summed losses, ours on their mean.
    theirs = LogisticRegression(
        C=1 / (strength * len(labels)), class_weight="balanced" if balanced else None, tol=1e-8,
        max_iter=2000,
    ).fit(x.double(), labels)  # fmt: skip
    ours = found(values).softmax(dim=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x.double()), atol=1e-4)


@pytest.mark.parametrize("dead", [0, 3, 12])
def test_a_feature_that_hardly_varies_does_not_decide(dead: int):
    """Also where most others are dead, as ReLU features of few images are."""
    values, labels = features((20, 20))
    hardly = 5e-7 * torch.randn(len(labels), 1, generator=torch.Generator().manual_seed(1))
    columns = torch.cat([values, hardly, torch.zeros(len(labels), dead)], dim=1)
    weight = fit(columns[None], labels, 2, 1e-3).weight
    assert weight[:, values.shape[1]].abs().max() < 1
    assert weight.isfinite().all()


def test_class_weights_reach_the_cross_validation_too():
    values, labels = features((60, 6))
    folds = torch.arange(66) % 5
    plain = solve(values[None], labels, 2, folds)
    weighted = solve(values[None], labels, 2, folds, balanced_weights((60, 6)))
    rare = labels == 1

    def right(solved: Solved) -> float:
        assert solved.chosen is not None
        return float(solved.chosen.logits.softmax(dim=1)[rare, 1].mean())

    assert right(weighted) > right(plain)


@pytest.mark.parametrize("settings", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
def test_the_default_head_respects_class_weights(separated, tmp_path, settings: dict):
    for path in sorted((separated / "train" / "wasps").iterdir())[2:]:
        path.unlink()
    shared = {
        "mode": "finetune",
        "backbone": "builtin",
        "image_size": 32,
        "workers": 0,
        "runs_dir": tmp_path,
    }
    heads = []
    for more in ({}, settings):
        classifier = prepare(Config.of(separated, **shared, **more)).classifier
        state = classifier.network.state_dict()
        heads.append(torch.cat([state[name].flatten() for name in sorted(classifier.head)]))
    assert not torch.allclose(*heads)


@pytest.mark.parametrize("width", [6, 90])  # fewer features than images, and more
def test_cross_validation_is_that_of_scikit_learn(width: int) -> None:
    values, labels = features((24, 20, 16), width)
    folds = torch.arange(60) % 3
    for trial in cross_validate(values[None], labels, 3, folds):
        for fold in range(3):
            inside = folds != fold
            x = StandardScaler().fit(values[inside].double())
            theirs = LogisticRegression(C=1 / (trial.penalty * 40), tol=1e-9, max_iter=10_000)
            theirs.fit(x.transform(values[inside].double()), labels[inside])
            expected = theirs.predict_proba(x.transform(values[~inside].double()))
            found = trial.logits[~inside].softmax(dim=1)
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_penalty_has_the_lowest_log_loss_out_of_fold() -> None:
    values, labels = features((30, 30), 40)
    solved = solve(values[None], labels, 2, torch.arange(60) % 5)
    losses = {trial.penalty: trial.calibration.loss for trial in solved.trials}
    assert len(losses) >= 4 and solved.chosen is not None
    assert losses[solved.chosen.penalty] == min(losses.values())
    again = fit(values[None], labels, 2, solved.chosen.penalty)
    assert torch.equal(solved.linear.weight, again.weight)


def test_all_views_are_learnt_from_and_the_first_is_predicted() -> None:
    values, labels = features((12, 12))
    views = torch.stack([values, torch.randn(24, 6, generator=torch.Generator().manual_seed(2))])
    trial = next(cross_validate(views, labels, 2, torch.arange(24) % 2))
    inside = torch.arange(24) % 2 == 1
    fitted = fit(views[:, inside], labels[inside], 2, trial.penalty)
    torch.testing.assert_close(
        trial.logits[~inside].softmax(1), fitted(values[~inside]).softmax(1), atol=1e-6, rtol=0
    )


def test_a_class_of_one_image_is_learnt_and_not_scored() -> None:
    values, labels = features((10, 10, 1))
    solved = solve(values[None], labels, 3, torch.arange(21) % 5)
    assert solved.chosen is not None
    assert solved.scored.tolist() == list(range(20)) and len(solved.chosen.logits) == 20
    assert solved.linear(values).softmax(dim=1)[:, 2].argmax() == 20


def test_without_two_images_of_any_class_all_are_learnt() -> None:
    values, labels = features((1, 1, 1))
    solved = solve(values[None], labels, 3, torch.arange(3))
    assert solved.chosen is None and solved.accuracy == 0
    assert solved.linear(values).argmax(dim=1).tolist() == [0, 1, 2]


def test_the_temperature_has_the_lowest_log_loss_of_a_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 3).sample()
    found = calibrate(logits, labels)
    grid = torch.logspace(-1, 1, 4000, dtype=torch.float64)
    losses = torch.stack([cross_entropy(logits / t, labels) for t in grid])
    prior = 4 * (1 / grid - 1 + grid.log()) / 200  # gamma in 1 / T, with its mode at 1
    best = (losses + prior).argmin()
    assert found.temperature == pytest.approx(float(grid[best]), rel=0.01)
    assert found.loss == pytest.approx(float(losses[best]), abs=1e-4)
    assert found.loss <= float(losses.min()) + 1e-3 < found.loss_before
    assert found.loss_before == pytest.approx(float(cross_entropy(logits, labels)))


def test_few_images_move_the_temperature_little_and_many_to_its_bounds() -> None:
    logits, right, wrong = torch.eye(3), torch.arange(3), torch.tensor([1, 2, 0])
    assert 0.6 < calibrate(logits, right).temperature < 1 < calibrate(logits, wrong).temperature < 2
    many = logits.repeat(10_000, 1)
    assert calibrate(many, right.repeat(10_000)).temperature < 0.12
    assert 10 < calibrate(many, wrong.repeat(10_000)).temperature <= 20


def test_calibrated_probabilities_are_as_sure_as_they_are_right() -> None:
    """The expected calibration error is at most two points above that of a classifier that is
    perfectly calibrated, on as many images: mean of draws of 300 images."""
    generator = torch.Generator().manual_seed(0)
    found, perfect = [], []
    for _ in range(20):
        logits = 3 * torch.randn(600, 4, generator=generator, dtype=torch.float64)
        labels = torch.distributions.Categorical(logits=logits / 2).sample()
        temperature = calibrate(logits[:300], labels[:300]).temperature
        for errors, t in ((found, temperature), (perfect, 2)):
            errors.append(calibration_error((logits[300:] / t).log_softmax(1), labels[300:]))
    assert np.mean(found) <= np.mean(perfect) + 0.02


def samples(labels: list[int], hashes: list[str], groups: tuple[str, ...] = ()) -> Samples:
    return Samples(
        tuple(f"{row}.png" for row in range(len(labels))), tuple(labels),
        tuple(str(c) for c in range(max(labels) + 1)), tuple(hashes), groups,
    )  # fmt: skip


def test_every_fold_holds_its_share_of_each_class() -> None:
    labels = [0] * 20 + [1] * 10 + [2] * 5
    folds = assign_folds(samples(labels, [f"{row:064}" for row in range(35)]), 5)
    for fold in range(5):
        counts = torch.bincount(torch.tensor(labels)[folds == fold], minlength=3)
        assert counts.tolist() == [4, 2, 1]


def test_copies_and_groups_are_in_one_fold() -> None:
    labels = [0] * 12 + [1] * 12
    hashes = [f"{row // 2:064}" for row in range(24)]
    groups = tuple(f"patient {row // 2 % 6}" for row in range(24))
    folds = assign_folds(samples(labels, hashes, groups), 3)
    assert folds.unique().tolist() == [0, 1, 2]
    for group in set(groups):
        members = [fold for fold, of in zip(folds.tolist(), groups, strict=True) if of == group]
        assert len(set(members)) == 1
    alone = assign_folds(samples(labels, hashes), 3).reshape(-1, 2)
    assert torch.equal(alone[:, 0], alone[:, 1])


def test_folds_do_not_depend_on_the_order_of_files() -> None:
    labels, hashes = [0, 1] * 10, [f"{row:064}" for row in range(20)]
    folds = assign_folds(samples(labels, hashes), 4)
    turned = assign_folds(samples(labels[::-1], hashes[::-1]), 4)
    assert torch.equal(folds, turned.flip(0))


def test_small_problems_are_solved_in_one_thread(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    one_fit = Path.fit

    def fit(path: Path, penalty: float) -> Linear:
        seen.append(torch.get_num_threads())
        return one_fit(path, penalty)

    monkeypatch.setattr(Path, "fit", fit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        labels = torch.arange(20) % 2
        solve(torch.randn(1, 20, 3), labels, 2, torch.arange(20) // 2 % 5)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
