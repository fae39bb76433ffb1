"""The summary that finetune shows before training."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from cnnft.cli import console

if TYPE_CHECKING:
    from cnnft.recipe import Plan


def show_plan(plan: "Plan") -> None:
    classes = Table(box=None, pad_edge=False)
    for column in ("class", "train", "val"):
        classes.add_column(column, justify="left" if column == "class" else "right")
    counts = list(zip(plan.train.classes, plan.train.counts(), plan.val.counts(), strict=True))
    shown = counts if len(counts) <= 20 else counts[:20]
    for name, train, val in shown:
        classes.add_row(name, str(train), str(val))
    if len(counts) > len(shown):
        classes.add_row(f"… {len(counts) - len(shown)} more", "", "")
    classes.add_row(f"{len(counts)} classes", str(len(plan.train)), str(len(plan.val)))
    console.say(classes)
    console.say()
    _show_skipped(plan)

    trained, frozen = plan.parameters
    spec = plan.classifier.input_spec
    console.say(f"backbone        {_backbone_line(plan)}")
    console.say(f"input           {spec.size} × {spec.size} px, {spec.fit}, {spec.interpolation}")
    console.say(
        f"mode            {plan.config.mode}: {trained:,} parameters train, {frozen:,} frozen"
    )
    for i, step in enumerate(plan.rates.derivation.split("; ")):
        console.say(f"{'' if i else 'learning rates':<16}{step}")
    console.say(
        f"training        {plan.config.epochs} epochs of {plan.batches.steps_per_epoch} steps, "
        f"{plan.config.schedule} schedule, on {plan.device}\n"
    )


def _show_skipped(plan: "Plan") -> None:
    most = 10
    for file in plan.skipped[:most]:
        console.warn(f"skipped {file.path}: {file.reason}")
    if len(plan.skipped) > most:
        console.warn(f"skipped {len(plan.skipped) - most} more: the run's skipped.csv lists them")
    if plan.leaked:
        console.warn(
            f"{plan.leaked} validation image(s) left out: the same file is in the training data"
        )


def _backbone_line(plan: "Plan") -> str:
    name, loaded = plan.classifier.identity.name, plan.weights
    if loaded is None:
        return f"{name}, random weights"
    text = f"{name}, {loaded.matched} pretrained tensors"
    if loaded.source != name:
        text += f" from {loaded.source}"
    if loaded.missing:
        text += f"; {len(loaded.missing)} missing stay random, such as {loaded.missing[0]}"
    return text


def plan_json(plan: "Plan") -> dict[str, Any]:
    trained, frozen = plan.parameters
    return {
        "classes": {
            name: {"train": train, "val": val}
            for name, train, val in zip(
                plan.train.classes, plan.train.counts(), plan.val.counts(), strict=True
            )
        },
        "backbone": plan.classifier.identity.name,
        "parameters": {"trained": trained, "frozen": frozen},
        "learning_rates": {"backbone": plan.rates.backbone, "head": plan.rates.head},
        "steps_per_epoch": plan.batches.steps_per_epoch,
        "skipped": [{"file": str(file.path), "reason": file.reason} for file in plan.skipped],
        "leaked": plan.leaked,
    }
