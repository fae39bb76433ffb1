"""The summary that finetune shows before training."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cnnft.cli import console
from cnnft.cli.leftout import show_left_out, skipped_json
from cnnft.cli.tables import table
from cnnft.config.schema import FIELDS
from cnnft.config.solving import about_steps, frozen
from cnnft.errors import listed

if TYPE_CHECKING:
    from cnnft.config.schema import Config
    from cnnft.runs.scores import Comparison
    from cnnft.training.advice import Advice
    from cnnft.training.events import Advised
    from cnnft.training.plan import Plan

_MOST_CLASSES = 20
_MOST_UNSCORED = 10


def show_plan(plan: "Plan") -> None:
    splits = {"train": plan.train.counts_by_class(), "val": plan.val.counts_by_class()}
    console.say(class_table({name: of for name, of in splits.items() if sum(of.values())}))
    console.say()
    _show_account(plan)
    spec = plan.classifier.input_spec
    rows = {
        "backbone": [_backbone_line(plan)],
        "input": [f"{spec.size} × {spec.size} px, {spec.fit}, {spec.interpolation}"],
    }
    if plan.head_from == "solver":
        rows["mode"] = [f"feature-extractor: {plan.parameters[1]:,} parameters frozen"]
        rows["head"] = _solver_lines(plan.config)
    else:
        rows |= _training_rows(plan)
    for name, lines in rows.items():
        for i, line in enumerate(lines):
            console.say(f"{'' if i else name:<16}{line}")
    console.say()


def _training_rows(plan: "Plan") -> dict[str, list[str]]:
    trained, kept = plan.parameters
    length = plan.length
    return {
        "images": [_pixels_line(plan)],
        "augmentation": [_augmentation_line(plan)],
        "mode": [f"{_mode_line(plan)}: {trained:,} parameters train, {kept:,} frozen"],
        "head": _head_lines(plan),
        "learning rates": plan.rates.derivation.split("; "),
        "also": _extras(plan),
        "training": [
            f"{length.epochs} epochs of {length.steps_per_epoch} steps, "
            f"{optimizer_words(plan.config)}, on {plan.device}, {plan.config.machine.precision}"
        ],
    }


def _solver_lines(config: "Config") -> list[str]:
    weighted = ", classes weigh the same" if config.balanced else ""
    lines = [
        f"logistic regression on frozen features, penalty by {config.freezing.folds}-fold "
        f"cross-validation{weighted}"
    ]
    if config.training.epochs != FIELDS["epochs"].default:
        lines.append("it takes no epochs: --epochs changes nothing")
    return lines


def optimizer_words(config: "Config") -> str:
    words = [f"{config.schedule.schedule} schedule", config.optim.optimizer]
    if config.schedule.warmup_epochs:
        words[0] += f" after a warmup (epochs: {config.schedule.warmup_epochs:g})"
    if config.optim.weight_decay:
        spared = "" if config.optim.decay_all else " (not of norms and biases)"
        words.append(f"weight decay {config.optim.weight_decay:g}{spared}")
    return ", ".join(words)


def _head_lines(plan: "Plan") -> list[str]:
    """Where the head starts from, and what of the loss a probe does not know."""
    if plan.head_from == "checkpoint":
        return ["from the checkpoint"]
    if plan.head_from == "new":
        lines = [f"new, {plan.config.network.head_init} initialisation"]
        if frozen(plan.config) and (flags := about_steps(plan.config)):
            lines.append(f"trained by steps, which {listed(flags, 3)} is about")
        return lines
    lines = ["linear probe"]
    if plan.advice is not None:
        lines[0] += f", cross-validated train accuracy {plan.advice.probe_accuracy:.1%}"
    loss = plan.config.loss
    ignored = {"--focal": loss.focal, "--label-smoothing": loss.label_smoothing}
    flags = [flag for flag, value in ignored.items() if value]
    if flags:
        lines.append(f"the probe minimises plain cross-entropy: it ignores {' and '.join(flags)}")
    return lines


def _extras(plan: "Plan") -> list[str]:
    """What was asked for in the loss, against overfitting, and in the end."""
    config = plan.config
    given = {
        "augmented views per image:": plan.batches.views,
        "label smoothing": config.loss.label_smoothing or None,
        "focal loss, gamma": config.loss.focal or None,
        "dropout": config.network.dropout or None,
        "stochastic depth (drop path)": config.network.drop_path or None,
        "L1 penalty": config.optim.l1 or None,
        "max-norm of the head": config.optim.max_norm,
        "gradient clipping, norm": config.optim.clip_grad,
        "EMA of the weights, decay": config.averaging.ema,
        "early stopping, patience": config.training.patience,
        "SWA, last epochs:": config.averaging.swa,
        "snapshot ensemble, models:": config.averaging.snapshots,
    }
    lines = [f"{words} {value:g}" for words, value in given.items() if value is not None]
    if config.loss.class_weights == "balanced":
        lines.append("loss weighted by inverse class frequency")
    if config.training.sampling == "balanced":
        lines.append("classes sampled with equal probability")
    return lines + [f"distillation from {teacher}" for teacher in config.loss.teacher]


def class_table(counts: Mapping[Any, dict[str, int]]) -> Table:
    """`counts`: split -> class -> images."""
    classes = list(next(iter(counts.values())))
    rows = [(name, *(of[name] for of in counts.values())) for name in classes[:_MOST_CLASSES]]
    if len(classes) > _MOST_CLASSES:
        rows.append((f"… {len(classes) - _MOST_CLASSES} more",))
    rows.append((f"{len(classes)} classes", *(sum(of.values()) for of in counts.values())))
    return table(("class", *counts), rows, numbers=range(1, len(counts) + 1))


def show_advice(advice: "Advice", say: Callable[[Any], None]) -> None:
    """The size × similarity table, with this dataset's cell marked, and the evidence."""
    from cnnft.training.advice import SIMILAR, SMALL, TABLE

    columns = {
        "similar": f"similar to the pretraining data (probe learns at least {SIMILAR:.0%})",
        "different": f"different (probe learns less than {SIMILAR:.0%})",
    }
    sizes = {
        "small": f"small (fewer than {SMALL} images per class)",
        "larger": f"larger (at least {SMALL} images per class)",
    }
    words = {(cell.size, cell.similarity): cell.words for cell in TABLE}
    words[advice.cell.size, advice.cell.similarity] = f"→ {advice.cell.words}"
    rows = [(name, *(words[size, column] for column in columns)) for size, name in sizes.items()]
    say(table(("training data", *columns.values()), rows))
    say(
        f"{advice.images_per_class:.0f} training images per class; a linear probe on frozen "
        f"features is right in {advice.probe_accuracy:.1%} (cross-validated; the majority class "
        f"has {advice.chance:.1%}), so it learns {advice.learned:.0%} of what there is to learn"
    )


def show_advised(event: "Advised") -> None:
    show_advice(event.advice, console.say)
    if event.trains:
        console.say(
            "the last stages are trained too, on the training part, to compare with; --mode "
            "feature-extractor spares that"
        )
    else:
        console.say("too few images are wrong to tell a better network from this head on val")
    console.say()


def show_comparison(found: "Comparison") -> None:
    outcomes = {
        "head": "not clearly better (two standard errors): the head stays",
        "trained": "clearly better (two standard errors): the trained network is the answer",
        "ensemble": "both are averaged: predicting takes twice as long as with one",
    }
    console.say(
        f"log-loss on val, n = {found.n}: the head {found.head_loss:.3f}, fitted without val; the "
        f"trained network {found.trained_loss:.3f}; difference {found.difference:+.3f} ± "
        f"{found.standard_error:.3f} (standard error); {outcomes[found.answer]}"
    )


def advice_json(advice: "Advice") -> dict[str, Any]:
    return {
        "size": advice.cell.size,
        "similarity": advice.cell.similarity,
        "settings": advice.cell.settings,
        "images_per_class": advice.images_per_class,
        "probe_accuracy": advice.probe_accuracy,
        "chance": advice.chance,
        "learned": advice.learned,
    }


def _show_account(plan: "Plan") -> None:
    """What became of the images that are not simply trained on."""
    data = str(plan.config.dataset.data)
    show_left_out(plan.dataset.skipped, data, "the run's skipped.csv lists all")
    for note in plan.dataset.notes:
        console.say(console.printable(note))
    if unscored := _unscored(plan):
        where = "have no image in val" if len(plan.val) else "have a single image"
        console.warn(
            f"{len(unscored)} class(es) {where}, so they are trained and have no "
            f"score: {console.printable(listed(unscored, _MOST_UNSCORED))}"
        )
    if pairs := plan.dataset.contradictions:
        console.warn(
            f"{len(pairs)} image(s) lie under two classes, such as {' = '.join(pairs[0])}: one of "
            "the labels is wrong (cnnft check lists them)"
        )


def _unscored(plan: "Plan") -> list[str]:
    """Classes that no score speaks of."""
    if len(plan.val):
        return plan.val.empty_classes()
    counts = plan.train.once().counts_by_class()
    return [name for name, count in counts.items() if count < 2]


def _pixels_line(plan: "Plan") -> str:
    from cnnft.cache.pixels import training_pixels

    pixels = training_pixels(plan.config.input, plan.classifier.input_spec)
    if pixels.short_side is None:
        return "decoded at full resolution"
    decoder = ", by JPEG draft mode" if pixels.decoder == "draft" else ""
    return f"decoded at {pixels.short_side} px on the shorter side, or less{decoder}"


def _mode_line(plan: "Plan") -> str:
    stages = plan.config.freezing.train_stages
    last = "" if stages is None else f", last {stages} of {len(plan.stages)} stages"
    return plan.config.freezing.mode + last


def _augmentation_line(plan: "Plan") -> str:
    from cnnft.data.augmentation import changes

    mixes = {
        "mixup": plan.config.augmentation.mixup or None,
        "cutmix": plan.config.augmentation.cutmix or None,
    }
    parts = [
        f"{name} {value:g}" if not isinstance(value, bool) else name if value else f"no {name}"
        for name, value in (changes(plan.config.augmentation) | mixes).items()
        if value is not None
    ]
    return ", ".join([plan.config.augmentation.augment, *parts])


def _backbone_line(plan: "Plan") -> str:
    name, loaded = plan.classifier.identity.name, plan.weights
    if loaded is None:
        return f"{name}, random weights"
    text = f"{name}, {loaded.matched} pretrained tensors"
    if loaded.source != name:
        text += f" from {loaded.source}"
    if loaded.unused:
        text += f"; {len(loaded.unused)} not used, such as {loaded.unused[0]}"
    if loaded.missing:
        text += f"; {len(loaded.missing)} missing stay random, such as {loaded.missing[0]}"
    return text


def plan_json(plan: "Plan") -> dict[str, Any]:
    trained, kept = plan.parameters
    return {
        "classes": {
            name: {"train": train, "val": val}
            for name, train, val in zip(
                plan.train.classes, plan.train.counts(), plan.val.counts(), strict=True
            )
        },
        "mode": plan.config.freezing.mode,
        "train_stages": plan.config.freezing.train_stages,
        "head": plan.head_from,
        "advice": None if plan.advice is None else advice_json(plan.advice),
        "backbone": plan.classifier.identity.name,
        "parameters": {"trained": trained, "frozen": kept},
        "learning_rates": {"backbone": plan.rates.backbone, "head": plan.rates.head},
        "steps_per_epoch": plan.batches.steps_per_epoch,
        "skipped": skipped_json(plan.dataset.skipped),
        "notes": plan.dataset.notes,
        "contradictions": plan.dataset.contradictions,
    }
