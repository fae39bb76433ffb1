"""The state that a run's first step begins with."""

from collections.abc import Sequence

from cnnft.data.augmentation import mixing
from cnnft.models.freezing import batchnorms
from cnnft.runs.records import Epoch
from cnnft.training.averaging import equal_average, running_average
from cnnft.training.constraints import gradient_rules, weight_rules
from cnnft.training.optim import make_optimizer
from cnnft.training.plan import Plan
from cnnft.training.schedules import make_schedule
from cnnft.training.state import TrainState


def make_state(plan: Plan, history: Sequence[Epoch]) -> TrainState:
    """As planned; the schedule looks at the `history`, which grows."""
    config, classifier = plan.config, plan.classifier
    network, head = classifier.network, classifier.head
    multiplier = make_schedule(config.schedule, plan.length)
    state = TrainState(
        network=network,
        optimizer=make_optimizer(network, head, plan.stages, plan.rates, config.optim),
        schedule=lambda step: multiplier(step, [epoch.val_loss for epoch in history]),
        keys=plan.batches,
        keep_statistics=batchnorms(network, head) if plan.freezes_statistics else (),
        mix=mixing(config.augmentation, len(classifier.classes)),
        before_step=gradient_rules(network, config.optim),
        after_step=weight_rules(network, head, config.optim),
        micro_batch=config.training.micro_batch,
        precision=config.machine.settled_precision,
        max_skipped_steps=config.training.skip_nonfinite,
    )
    per_epoch = plan.batches.steps_per_epoch
    if config.averaging.ema is not None:
        state.average = running_average(network, config.averaging.ema)
    elif config.averaging.swa is not None:
        begin = (config.training.epochs - config.averaging.swa) * per_epoch
        state.average = equal_average(network)
        state.averaged = lambda step: step > begin and step % per_epoch == 0
    return state
