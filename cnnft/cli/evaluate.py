"""cnnft evaluate DATA -m RUN: accuracy and other metrics on images that it was not trained on."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnft.cli import console, options
from cnnft.cli.leftout import show_left_out, skipped_json
from cnnft.cli.tables import percent, table
from cnnft.config.choices import Split

if TYPE_CHECKING:
    from cnnft.analysis.evaluate import Evaluation
    from cnnft.analysis.viewsets import ViewSetScore

_UNKNOWN = {"left_out": None, "selected_on_val": None}
"""An exported file does not know what it was trained on."""

_MOST_COLUMNS = 20  # of a confusion matrix on a terminal; --json has all


def command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Image folder, as for finetune.")],
    model: options.Model,
    split: Annotated[Split, typer.Option(help="Split to evaluate on.")] = "val",
    layout: options.Layout = "auto",
    include_hidden: options.IncludeHidden = False,
    tta: options.TtaOrAll = "none",
    weights: options.Weights = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = None,
    read_timeout: options.ReadTimeout = options.READ_TIMEOUT,
    precision: options.Precision = "float32",
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Evaluate a model on labelled images, without those that it was trained on."""
    from cnnft.analysis.evaluate import Seen, evaluate, splits_to_evaluate, unseen
    from cnnft.analysis.viewsets import SETS, compare_view_sets
    from cnnft.data.reading import read_dataset
    from cnnft.data.sources import open_source
    from cnnft.inference.predict import Inference
    from cnnft.inference.storage import load
    from cnnft.machine.devices import keep_freed_memory
    from cnnft.runs.run import Run

    classifier = load(model, weights=weights, device=device)
    if classifier.device.type == "cpu":
        keep_freed_memory()
    run = Run.open(model) if Run.is_run(model) else None
    if run is None:
        console.warn(f"{model} does not say what it was trained on: no image is left out")
    with console.progress() as bar:
        reading = console.reading_images(bar)
        evaluating = bar.add_task("evaluating", total=None, visible=False)
        source = open_source(
            data,
            layout,
            include_hidden=include_hidden,
            classes=classifier.classes,
            on_files=reading,
        )
        parts = splits_to_evaluate(source, split)
        dataset = read_dataset(
            source,
            parts,
            classes=classifier.classes,
            on_files=reading,
            read_timeout=read_timeout,
        )
        inference = Inference(
            "none" if tta == "all" else tta,
            batch_size,
            workers,
            precision,
            read_timeout=read_timeout,
        )
        seen = Seen.by(run) if run else Seen()
        evaluation = evaluate(
            classifier,
            dataset,
            inference,
            seen,
            lambda total: bar.update(evaluating, total=total, advance=1, visible=True),
        )
        view_sets = []
        if tta == "all":
            kept = unseen(dataset, seen)
            bar.update(evaluating, total=len(kept) * (1 + len(SETS)))
            view_sets = compare_view_sets(
                classifier, kept, inference, on_image=lambda: bar.advance(evaluating)
            )
    show_left_out(evaluation.skipped, dataset.source, "--json lists all")
    for note in dataset.notes:
        console.say(console.printable(note))
    if pairs := evaluation.contradictions:
        console.warn(
            f"{len(pairs)} image(s) lie under two classes, such as "
            f"{console.printable(' = '.join(pairs[0]))}: they count under both"
        )
    if copies := evaluation.copies:
        console.warn(
            f"{copies} image(s) are copies of others here and count again: the interval is "
            "narrower than it should be"
        )
    if evaluation.unrecognised:
        console.warn(
            f"{evaluation.unrecognised} image(s) of the training and validation of {model} are not "
            f"in {data}, or were changed: one that was changed counts as unseen"
        )
    if json:
        known = run is not None
        more = {"view_sets": [_view_set_json(of) for of in view_sets]} if view_sets else {}
        console.result_json(_json(evaluation) | ({} if known else _UNKNOWN) | more)
        return
    _show(evaluation)
    if view_sets:
        console.result("\ntest-time augmentation (difference from none, paired, 95% interval)")
        console.result(_view_set_table(view_sets))


def _show(evaluation: "Evaluation") -> None:
    overall = evaluation.overall
    low, high = overall.interval
    lines = [
        f"top-1 accuracy  {overall.accuracy:.1%}  (95% interval {low:.1%} to {high:.1%}, "
        f"n = {overall.n}; majority-class baseline {evaluation.chance:.1%})"
    ]
    if evaluation.top5 is not None:
        lines.append(f"top-5 accuracy  {evaluation.top5:.1%}")
    macro = evaluation.macro
    lines += [
        f"macro average   precision {macro.precision:.1%}, recall {macro.recall:.1%}, "
        f"F1 {macro.f1:.1%} (unweighted mean over classes)",
        f"mean loss       {overall.loss:.4f}",
        f"calibration     {evaluation.calibration_error:.1%} expected calibration error (ECE)",
    ]
    if found := evaluation.calibration:
        lines.append(
            f"temperature     {found.temperature:.2f}: loss {found.loss_before:.4f} → "
            f"{overall.loss:.4f}, ECE {found.ece_before:.1%} → {found.ece:.1%}"
        )
    if evaluation.left_out:
        lines.append(f"left out        {evaluation.left_out} images that the model was trained on")
    if evaluation.selected_on:
        lines.append(
            f"selected on val {evaluation.selected_on} of these images chose the model's best "
            "epoch, so the accuracy is optimistic"
        )
    if evaluation.out_of_fold:
        lines.append(
            "out of fold     these images were trained on: each was predicted by a head that was "
            "fitted on the other folds; the penalty was selected on these folds"
        )
    console.result("\n".join(lines) + "\n")
    console.result(_class_table(evaluation))
    if len(evaluation.classes) <= _MOST_COLUMNS:
        console.result("\nconfusion matrix (rows: true class, columns: predicted)")
        console.result(_confusion_table(evaluation))


def _class_table(evaluation: "Evaluation") -> Any:
    rows = (
        (row.name, row.n, percent(row.precision), percent(row.recall), percent(row.f1))
        for row in evaluation.classes
    )
    return table(("class", "n", "precision", "recall", "F1"), rows, numbers=range(1, 5))


def _confusion_table(evaluation: "Evaluation") -> Any:
    names = [row.name for row in evaluation.classes]
    rows = ((name, *counts) for name, counts in zip(names, evaluation.confusion, strict=True))
    return table(("", *names), rows, numbers=range(1, len(names) + 1))


def _view_set_table(scores: Sequence["ViewSetScore"]) -> Any:
    first = scores[0]
    rows = (
        (
            of.name,
            of.views,
            percent(of.score.accuracy),
            "" if of is first else "{:+.1%} to {:+.1%}".format(*of.difference),
            f"{of.score.loss:.4f}",
            percent(of.calibration_error),
            f"{of.seconds / first.seconds:.1f}",
        )
        for of in scores
    )
    head = ("view set", "views", "accuracy", "difference", "log-loss", "ECE", "time")
    return table(head, rows, numbers=range(1, 7))


def _view_set_json(of: "ViewSetScore") -> dict[str, Any]:
    return {
        "tta": of.name,
        "views": of.views,
        "accuracy": of.score.accuracy,
        "difference95": of.difference,
        "loss": of.score.loss,
        "calibration_error": of.calibration_error,
        "seconds": of.seconds,
    }


def _json(evaluation: "Evaluation") -> dict[str, Any]:
    overall = evaluation.overall
    return {
        "n": overall.n,
        "correct": overall.correct,
        "accuracy": overall.accuracy,
        "interval95": overall.interval,
        "chance": evaluation.chance,
        "top5": evaluation.top5,
        "macro": dataclasses.asdict(evaluation.macro),
        "loss": overall.loss,
        "calibration_error": evaluation.calibration_error,
        "calibration": evaluation.calibration and dataclasses.asdict(evaluation.calibration),
        "left_out": evaluation.left_out,
        "copies": evaluation.copies,
        "selected_on_val": evaluation.selected_on,
        "out_of_fold": evaluation.out_of_fold,
        "classes": [dataclasses.asdict(row) for row in evaluation.classes],
        "confusion": evaluation.confusion,
        "skipped": skipped_json(evaluation.skipped),
    }
