"""Try every backbone of timm and torchvision and write the tables of cnnft/models.

    python -m tools.sweep [--only PATTERN] [--jobs 2] [--train 30]
    python -m tools.sweep --weights     # pretrained.csv alone, which builds nothing

Each network is built with a head for 7 classes, without memory where it can (torch's meta device),
and `examine` checks what cnnft promises of it. `--train N` takes a real training step, on noise
images, with N networks drawn at random among those of fewer than 30 million parameters.
"""

import argparse
import csv
import fnmatch
import random
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch.nn.functional import cross_entropy

from cnnft.config.schema import Config
from cnnft.data.sampler import KeyedBatches
from cnnft.errors import CnnftError
from cnnft.models.build import build, with_auxiliary
from cnnft.models.freezing import freeze
from cnnft.models.heads import head_tensors
from cnnft.models.identity import input_spec
from cnnft.models.registry import names, remote_weights, resolve
from cnnft.models.stages import stages
from cnnft.training.optim import Start, learning_rates, make_optimizer
from cnnft.training.schedules import Length, make_schedule
from cnnft.training.state import TrainState
from cnnft.training.step import StepDone, train
from tools.document import fill

TABLE = Path(__file__).parents[1] / "cnnft" / "models" / "catalogue.csv"
PRETRAINED = TABLE.with_name("pretrained.csv")
DOCUMENT = Path(__file__).parents[1] / "docs" / "backbones.md"
CLASSES = 7
SMALL = 30_000_000  # parameters of a network that takes a training step
SEED = 0


@dataclass
class Row:
    name: str
    parameters: int = 0
    """Of the backbone, without the head."""
    input_size: int = 0
    stages: int = 0
    head_tensors: int = 0
    result: str = "ok"
    step: str = ""
    """"ok" where a training step was taken too."""


def examine(name: str) -> Row:
    """Build `name` with a head for 7 classes and check every promise; says which one fails."""
    row = Row(name)
    try:
        identity = with_auxiliary(resolve(name))
        size = row.input_size = input_spec(identity).size
        network, device = _build(identity)
        head = head_tensors(network, lambda classes: build(identity, classes))
        groups = stages(network, head)
        parameters = dict(network.named_parameters())
        row.parameters = sum(p.numel() for n, p in parameters.items() if n not in head)
        row.stages, row.head_tensors = len(groups), len(head)
        row.result = _broken_promise(identity, network, head, groups, size, device) or "ok"
    except CnnftError as error:
        row.result = f"refused: {error}"
    except Exception as error:
        row.result = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def _build(identity):
    try:
        with torch.device("meta"):
            return build(identity, CLASSES), "meta"
    except (RuntimeError, NotImplementedError):  # some compute their widths with tensors
        return build(identity, CLASSES), "cpu"


def _broken_promise(identity, network, head, groups, size: int, device: str) -> str | None:
    parameters = dict(network.named_parameters())
    if not head:
        return "no head to replace"
    staged = [name for group in groups for name in group]
    if sorted(staged) != sorted(parameters.keys() - head):
        return "the stages do not hold every backbone parameter once"
    shapes = {n: t.shape for n, t in network.state_dict().items() if n not in head}
    with torch.device(device):
        original = build(identity, 1000).state_dict()
    if any(n not in original or original[n].shape != shape for n, shape in shapes.items()):
        return "a backbone tensor changes with the head"
    freeze(network, head, groups, "feature-extractor")
    if {n for n, p in parameters.items() if p.requires_grad} != head & parameters.keys():
        return "feature-extractor mode trains something else than the head"
    for train_stages in (None, 1):
        freeze(network, head, groups, "finetune", train_stages)
        config = Config.of("-", layer_decay=0.5).optim
        rates = learning_rates(config, identity.architecture, 32, Start("pretrained"))
        make_optimizer(network, head, groups, rates, config)
    try:
        logits = _forward(network, size, device)
    except Exception:  # some need values, not only shapes
        network = build(identity, CLASSES)
        logits = _forward(network, size, "cpu")
    if logits.shape != (2, CLASSES):
        return f"the output is {tuple(logits.shape)}"
    return None


def _forward(network, size: int, device: str):
    network.eval()
    with torch.no_grad():
        return network(torch.zeros(2, 3, size, size, device=device))


def take_step(name: str) -> str:
    """One training step of all layers on four noise images, through cnnft's own `train`."""
    try:
        identity = with_auxiliary(resolve(name))
        size = input_spec(identity).size
        torch.manual_seed(SEED)
        network = build(identity, CLASSES)
        head = head_tensors(network, lambda classes: build(identity, classes))
        groups = stages(network, head)
        freeze(network, head, groups, "finetune")
        config = Config.of("-", epochs=1)
        rates = learning_rates(config.optim, identity.architecture, 4, Start("pretrained"))
        state = TrainState(
            network=network,
            optimizer=make_optimizer(network, head, groups, rates, config.optim),
            schedule=make_schedule(config.schedule, Length(1, 1)),
            keys=KeyedBatches(4, 4, SEED, 1),
        )
        before = {n: p.detach().clone() for n, p in network.named_parameters() if n in head}
        batch = torch.randn(4, 3, size, size), torch.arange(4) % CLASSES
        event = next(iter(train(state, [batch], partial(cross_entropy, reduction="sum"))))
        assert isinstance(event, StepDone)
        if not event.loss.isfinite():
            return "the loss is not finite"
        after = dict(network.named_parameters())
        if any(torch.equal(tensor, after[name]) for name, tensor in before.items()):
            return "a tensor of the head did not move"
        return "ok"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@dataclass
class PretrainedRow:
    """A set of weights."""

    backbone: str
    weights: str
    """As --backbone takes it."""
    licence: str
    """Empty where the library does not say."""
    place: str
    """A URL, or a repository on the Hugging Face hub; empty: it ships with cnnft."""
    files: str
    """In the repository, any of them, the one preferred first."""


def pretrained(name: str) -> list[PretrainedRow]:
    """What the installed library has for an architecture, the default first."""
    if name == "builtin":
        return [PretrainedRow(name, name, "apache-2.0", "", "")]
    rows = []
    for full in _tagged(name):
        identity = resolve(full)
        remote = remote_weights(identity)
        licence = identity.pretrained_cfg.get("license") or ""
        rows.append(PretrainedRow(name, full, licence, remote.place, " ".join(remote.names)))
    return rows


def _tagged(name: str) -> list[str]:
    if name.startswith("torchvision/"):
        options = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
        found = [f"{name}@{option.name}" for option in options]
        default = f"{name}@{options['DEFAULT'].name}"
    else:
        found = timm.list_pretrained(name)
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        default = f"{name}.{config.tag}" if config is not None and config.tag else name
    return sorted(found, key=lambda full: full != default)


def write_pretrained(backbones: list[str], path: Path) -> None:
    """The table of all of them, under the versions that it is of."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# timm {timm.__version__} and torchvision {_release(torchvision)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(PretrainedRow))
        for name in backbones:
            writer.writerows(asdict(row).values() for row in pretrained(name))


def _release(module) -> str:
    return module.__version__.partition("+")[0]


def _quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="names that match, such as 'torchvision/*'")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--train", type=int, default=30, help="networks that take a step")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--weights", action="store_true", help="write pretrained.csv alone")
    options = parser.parse_args()
    if options.only == "*" and options.output == TABLE:
        write_pretrained(["builtin", *names()], PRETRAINED)
    if options.weights:
        return

    started = time.monotonic()
    chosen = fnmatch.filter(["builtin", *names()], options.only)
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, initializer=_quiet) as pool:
        for row in pool.map(examine, chosen, chunksize=4):
            rows.append(row)
            if row.result != "ok":
                print(f"{row.name}: {row.result}", flush=True)
        fit = [row for row in rows if row.result == "ok" and row.parameters < SMALL]
        drawn = random.Random(SEED).sample(fit, min(options.train, len(fit)))
        for row, step in zip(drawn, pool.map(take_step, [r.name for r in drawn]), strict=True):
            row.step = step
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(asdict(row).values() for row in rows)
    text = summary(rows, time.monotonic() - started, options.jobs)
    print(text)
    if options.only == "*":
        fill(DOCUMENT, "sweep", text)


def summary(rows: list[Row], seconds: float, jobs: int) -> str:
    """Markdown: how many of each library are supported, which are not and why."""
    lines = ["| library | architectures | supported |", "|---|---|---|"]
    for library in ("torchvision", "timm"):
        of = [row for row in rows if row.name.startswith("torchvision/") == (library != "timm")]
        of = [row.result == "ok" for row in of if row.name != "builtin"]
        if of:
            lines.append(f"| {library} | {len(of)} | {sum(of)} ({sum(of) / len(of):.1%}) |")
    failed = [row for row in rows if row.result != "ok"]
    if failed:
        lines += ["", "Not supported:", ""]
        lines += [f"- `{row.name}`: {row.result}" for row in failed]
    steps = [row for row in rows if row.step]
    if steps:
        took = sum(row.step == "ok" for row in steps)
        names_ = ", ".join(f"`{row.name}`" for row in steps)
        lines += ["", f"A training step was taken by {took} of {len(steps)}: {names_}."]
        lines += [f"- `{row.name}`: {row.step}" for row in steps if row.step != "ok"]
    lines += [
        "",
        f"timm {timm.__version__}, torchvision {torchvision.__version__}, torch "
        f"{torch.__version__}, {seconds / 60:.0f} minutes in {jobs} process(es) of one thread.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
