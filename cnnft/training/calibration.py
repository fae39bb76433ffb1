"""The temperature of a run's model, fitted when that is chosen and nothing trains any more."""

from dataclasses import replace

from cnnft.inference.classifier import Classifier
from cnnft.machine import distributed
from cnnft.probe.calibrate import PRIOR, calibrate
from cnnft.runs.records import Metrics
from cnnft.runs.run import Run


def calibrated(run: Run, classifier: Classifier, metrics: Metrics) -> Metrics:
    """Fit the temperature to the saved predictions, of val or out of fold, and save it.

    Whatever the classes weighed in training, here each image weighs the same.

    Returns:
        metrics, with what the temperature changed; saved too. `classifier` is as it was.
    """
    return distributed.broadcast_from_main(lambda: _calibrated(run, classifier, metrics))


def _calibrated(run: Run, classifier: Classifier, metrics: Metrics) -> Metrics:
    found = run.predictions()
    assert found is not None
    temperature = calibrate(found.logits, found.labels, prior=PRIOR).temperature
    found = replace(found, temperature=temperature)
    metrics = replace(metrics, val=found.score(), calibration=found.calibration())
    run.save_description(replace(classifier, temperature=temperature))
    run.save_metrics(metrics)
    return metrics
