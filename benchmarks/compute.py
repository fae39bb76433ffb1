"""What the order in memory, folding, precision and memory that is kept make of a network's speed.

    python -m benchmarks.compute networks NAME... [--size 224] [--batch-size 32] [--give-back]
    python -m benchmarks.compute predict FOLDER -m RUN [--batch-size 32] [--workers 2]
    python -m benchmarks.compute start FOLDER [--backbone builtin]
    python -m benchmarks.compute image FILE -m RUN

networks: milliseconds of CPU time of one thread for an image, forward and in a training step; the
ways to compute take turns. --give-back: without `keep_freed_memory`, which is for a whole process.
predict: `Classifier.stream` and timm's own loader and loop take turns on the same class folders,
each in a process of its own, with the same batch size and number of workers: CPU time with that of
the workers, and elapsed time, both with starting workers and without imports.
start: what `cnnft finetune FOLDER --cache off --workers 0` does up to its first step, in seconds of
CPU time.
image: whole processes take turns: `cnnft predict FILE -m RUN`, importing the libraries it needs
as Python does it, and with garbage collected as seldom as by the command line; in seconds
of CPU time.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch import Tensor, nn

from cnnft import load
from cnnft.data.folders import image_files
from cnnft.machine.devices import autocast, keep_freed_memory, place
from cnnft.models.surgery.fold import folded

CPU = torch.device("cpu")
ROUNDS = 5
HALF = "bfloat16"

Way = Callable[[], object]


def networks(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if not options.give_back:
        keep_freed_memory()
    print("| network | | plain | channels last | folded | bfloat16 |\n|---|---|---|---|---|---|")
    for name in options.names:
        plain = timm.create_model(name)
        placed = place(copy.deepcopy(plain), CPU)
        quick = folded(copy.deepcopy(placed), options.size)
        pixels = torch.randn(options.batch_size, 3, options.size, options.size)
        forwards = {n: partial(forward, network, pixels) for n, network in
                    (("plain", plain), ("channels last", placed), ("folded", quick))}  # fmt: skip
        forwards[HALF] = partial(forward, quick, pixels, HALF)
        steps = {n: partial(step, network, pixels) for n, network in
                 (("plain", plain), ("channels last", placed))}  # fmt: skip
        steps[HALF] = partial(step, placed, pixels, HALF)
        for what, ways in (("forward", forwards), ("training", steps)):
            best = {n: min(seconds) for n, seconds in take_turns(ways, time.process_time).items()}
            cells = [1000 * best[n] / options.batch_size if n in best else None for n in forwards]
            shown = [f"{cell:.1f}" if cell else "" for cell in cells]
            print(f"| {name} | {what} | {' | '.join(shown)} |", flush=True)


@torch.inference_mode()
def forward(network: nn.Module, pixels: Tensor, precision: str = "float32") -> None:
    with autocast(precision, CPU):
        network.eval()(pixels)


def step(network: nn.Module, pixels: Tensor, precision: str = "float32") -> None:
    with autocast(precision, CPU):
        logits = network.train()(pixels)
    logits.float().log_softmax(dim=1)[:, 0].sum().backward()
    network.zero_grad()


def predict(options: argparse.Namespace) -> None:
    loop = (sys.executable, "-m", "benchmarks.compute", "loop", *sys.argv[2:], "--of")
    times: dict[str, list[dict[str, float]]] = {"timm": [], "cnnft": []}
    for _ in range(options.rounds):
        for name, spent in times.items():
            done = subprocess.run((*loop, name), check=True, capture_output=True, text=True)
            spent.append(json.loads(done.stdout))
    print(f"{torch.get_num_threads()} thread(s), {options.workers} worker(s)")
    for what in ("CPU time", "elapsed"):
        timm_s, cnnft_s = ([one[what] for one in spent] for spent in times.values())
        ratios = [theirs / ours for theirs, ours in zip(timm_s, cnnft_s, strict=True)]
        print(
            f"{what}, ms an image: timm {statistics.median(timm_s):.1f}, cnnft "
            f"{statistics.median(cnnft_s):.1f}; {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def loop(options: argparse.Namespace) -> None:
    """Milliseconds for an image of `options.folder`, as JSON."""
    files, _ = image_files(options.folder)
    common = {"batch_size": options.batch_size}
    if options.of == "timm":
        network = timm.create_model(f"local-dir:{options.model}", pretrained=True).eval()
        way: Way = partial(
            timms_loop, network, options.folder, num_workers=options.workers, **common
        )
    else:
        stream = load(options.model, device="cpu").stream
        way = lambda: list(stream(files, workers=options.workers, **common))  # noqa: E731
    clocks = {"CPU time": cpu_with_workers, "elapsed": time.perf_counter}
    before = {what: clock() for what, clock in clocks.items()}
    way()
    print(json.dumps({w: 1000 * (c() - before[w]) / len(files) for w, c in clocks.items()}))


START = """
import sys, tempfile, time
spent = {"Python": time.process_time()}
import torch
spent["torch"] = time.process_time()
import torchvision, torch._dynamo  # which torchvision and torch's optimizers import
spent["torchvision and torch._dynamo"] = time.process_time()
import timm
spent["timm"] = time.process_time()
import cnnft.cli.finetune, cnnft.training.finetune
spent["cnnft"] = time.process_time()
from cnnft import Config
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
with tempfile.TemporaryDirectory() as runs:
    settings = {"backbone": sys.argv[2], "runs_dir": runs, "workers": 0, "cache": "off"}
    plan = prepare(Config.of(sys.argv[1], **settings))
    spent["data, backbone and probe"] = time.process_time()
    events = run_plan(plan)
    assert any(type(event).__name__ == "StepDone" for event in events)
    spent["first step"] = time.process_time()
    events.close()
before = 0
for what, seconds in spent.items():
    print(f"{what:30}{seconds - before:6.2f} s")
    before = seconds
"""


def start(options: argparse.Namespace) -> None:
    """In a process of its own."""
    subprocess.run((sys.executable, "-c", START, options.folder, options.backbone), check=True)


IMPORT = "import torch, torchvision, timm"
SELDOM = f"import atexit, gc; gc.set_threshold(10_000); atexit.register(gc.freeze); {IMPORT}"


def image(options: argparse.Namespace) -> None:
    """Of one image: what is left when the libraries are there."""
    commands = {
        "importing alone": ("-c", IMPORT),
        "and garbage collected seldom": ("-c", SELDOM),
        "cnnft predict": ("-m", "cnnft", "predict", options.file, "-m", options.model),
    }
    ways = {
        name: partial(subprocess.run, (sys.executable, *command), check=True, capture_output=True)
        for name, command in commands.items()
    }
    times = take_turns(ways, cpu_with_workers)
    for name, seconds in times.items():
        print(f"{name:30}{statistics.median(seconds):6.2f} s")
    *imports, whole = times.values()
    for name, alone in zip(ways, imports, strict=False):
        rest = [ours - floor for ours, floor in zip(whole, alone, strict=True)]
        shown = f"{statistics.median(rest):.2f} s ({min(rest):.2f} to {max(rest):.2f})"
        print(f"the rest, beside {name}: {shown}")


@torch.inference_mode()
def timms_loop(network: nn.Module, folder: Path, **options: int) -> None:
    """As timm's inference.py: softmax, the likeliest class and its probability of each image."""
    loader = create_loader(
        create_dataset("", str(folder)),
        **resolve_model_data_config(network),
        **options,
        device=CPU,
        persistent_workers=False,
    )
    found: list[tuple[float, int]] = []
    for pixels, _ in loader:
        values, labels = network(pixels).softmax(dim=-1).topk(1)
        found += zip(values[:, 0].tolist(), labels[:, 0].tolist(), strict=True)


def cpu_with_workers() -> float:
    """Seconds of this process and of those that it has started and that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def take_turns(ways: dict[str, Way], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if number:
                times[name].append(clock() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    commands = parser.add_subparsers(required=True)
    of_networks = commands.add_parser("networks")
    of_networks.add_argument("names", nargs="+")
    of_networks.add_argument("--size", type=int, default=224)
    of_networks.add_argument("--give-back", action="store_true")
    of_networks.set_defaults(run=networks)
    of_predict, of_loop = commands.add_parser("predict"), commands.add_parser("loop")
    for command in (of_predict, of_loop):
        command.add_argument("folder", type=Path)
        command.add_argument("-m", "--model", required=True)
        command.add_argument("--workers", type=int, default=2)
        command.add_argument("--rounds", type=int, default=ROUNDS)
    of_loop.add_argument("--of", choices=("timm", "cnnft"))
    of_predict.set_defaults(run=predict)
    of_loop.set_defaults(run=loop)
    of_start = commands.add_parser("start")
    of_start.add_argument("folder")
    of_start.add_argument("--backbone", default="builtin")
    of_start.set_defaults(run=start)
    of_image = commands.add_parser("image")
    of_image.add_argument("file", type=Path)
    of_image.add_argument("-m", "--model", required=True)
    of_image.set_defaults(run=image)
    for command in (of_networks, of_predict, of_loop):
        command.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
