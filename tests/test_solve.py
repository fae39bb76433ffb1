"""The linear probe: its solver against scikit-learn, and features that must not decide."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from cnnft import Config
from cnnft.probe.solve import fit, fit_probe
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
    weight, bias = fit(values, labels, 3, strength, weights)
    # Its penalty is 1 / (2 C) on summed losses, ours on their mean.
    theirs = LogisticRegression(
        C=1 / (strength * len(labels)), class_weight="balanced" if balanced else None, tol=1e-8,
        max_iter=2000,
    ).fit(x.double(), labels)  # fmt: skip
    ours = (values @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x.double()), atol=1e-4)


@pytest.mark.parametrize("dead", [0, 3, 12])
def test_a_feature_that_hardly_varies_does_not_decide(dead: int):
    """Also where most others are dead, as ReLU features of few images are."""
    values, labels = features((20, 20))
    hardly = 5e-7 * torch.randn(len(labels), 1, generator=torch.Generator().manual_seed(1))
    weight, _ = fit(
        torch.cat([values, hardly, torch.zeros(len(labels), dead)], dim=1), labels, 2, 1e-3
    )
    assert weight[:, values.shape[1]].abs().max() < 1
    assert weight.isfinite().all()


def test_class_weights_reach_the_cross_validation_too():
    values, labels = features((60, 6))
    plain = fit_probe(values, labels, 2, seed=0)
    weighted = fit_probe(values, labels, 2, seed=0, class_weights=balanced_weights((60, 6)))
    rare = labels == 1

    def right(probe: object) -> float:
        predicted = (values @ probe.weight.T + probe.bias).argmax(dim=1)
        return float((predicted[rare] == 1).float().mean())

    assert right(weighted) > right(plain)


@pytest.mark.parametrize("settings", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
def test_the_default_head_respects_class_weights(separated, tmp_path, settings: dict):
    for path in sorted((separated / "train" / "wasps").iterdir())[2:]:
        path.unlink()
    shared = {"backbone": "builtin", "image_size": 32, "workers": 0, "runs_dir": tmp_path}
    heads = []
    for more in ({}, settings):
        classifier = prepare(Config.of(separated, **shared, **more)).classifier
        state = classifier.network.state_dict()
        heads.append(torch.cat([state[name].flatten() for name in sorted(classifier.head)]))
    assert not torch.allclose(*heads)
