"""What cnnft promises of a GPU, tried on one; and how fast it is there.

    python3 -m tools.gpu [--output docs/gpu.md] [--only NAME ...] [--device cuda]

Needs a checkout, not an installation, and no pytest. Where there is no such device it says so and
is done. `--device cpu` tries the program itself: it runs the same checks, small, and lets memory
run out where it is told to.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

try:
    import tomli_w  # noqa: F401
except ImportError:  # a machine where nothing can be installed; settings are flat and plain
    sys.modules["tomli_w"] = stand_in = ModuleType("tomli_w")
    stand_in.dumps = lambda values: "".join(  # type: ignore[attr-defined]
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()
    )

from safetensors.torch import load_file

from benchmarks.limit import throughput
from benchmarks.peers import Job
from benchmarks.report import machine
from benchmarks.synthetic import draw_images, random_weights
from cnnft import Config, load
from cnnft.data.loading import Loading, view_batches
from cnnft.data.reading import read_dataset
from cnnft.data.transforms import EvaluationViews
from cnnft.inference.predict import Inference, collect, predict, predict_batches
from cnnft.machine.environment import environment
from cnnft.models.freezing import train_mode
from cnnft.runs.records import Epoch
from cnnft.runs.run import Run
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone
from tools.document import fill
from tools.each_step import follow, start_torchrun

SAME_LOGITS = 1e-3
"""Largest difference of logits of about 1 between devices, in float32: sums in another order."""
SAME_LOSSES = 5e-3
"""And of the losses of a few steps, which pass such differences on to each other."""
SAME_WEIGHTS = 1e-3


class SkippedError(Exception):
    """The check cannot be made here, because ..."""


@dataclass(frozen=True)
class Bench:
    """Where checks are made, and with how much."""

    device: str
    folder: Path
    """For data and runs."""
    full: bool
    """On a GPU; else small, to try the program."""

    @property
    def data(self) -> Path:
        """JPEGs of two classes, to train on and to validate on; drawn when first needed."""
        folder = self.folder / "data"
        if not folder.exists():
            size = (320, 240) if self.full else (40, 32)
            draw_images(folder / "train", 640 if self.full else 24, size=size)
            draw_images(folder / "val", 64 if self.full else 8, size=size, seed=1)
        return folder

    def config(self, **settings: object) -> Config:
        """In float32, of batches that leave the last one of an epoch partial."""
        own = {
            "backbone": "builtin", "device": self.device, "precision": "float32", "workers": 0,
            "mode": "finetune", "epochs": 2, "probe_first": False,
            "batch_size": 96 if self.full else 8,
            "image_size": 128 if self.full else 32, "runs_dir": self.folder / "runs",
        }  # fmt: skip
        return Config.of(self.data, **(own | settings))

    def train(self, **settings: object) -> Run:
        for event in run_plan(prepare(self.config(**settings))):
            finished = event
        return finished.run

    def losses(self, steps: int, **settings: object) -> list[float]:
        """Of the first steps."""
        events = run_plan(prepare(self.config(**settings)))
        done = (event for event in events if isinstance(event, StepDone))
        found = [float(event.loss) for event in islice(done, steps)]
        events.close()
        return found


# ---------------------------------------------------------------- memory that runs out


class Memory:
    """Of the device: `peak` of what was done last, and how often it has run out."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.on_gpu = bench, bench.device.startswith("cuda")
        self.refused = 0

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved() if self.on_gpu else 0

    @contextmanager
    def limited(
        self, most: int, network: nn.Module | None = None, images: int = 0
    ) -> Iterator[None]:
        """To `most` bytes; on a CPU its first convolution takes no more than `images` at once."""
        self.free()
        before = self._times()
        if self.on_gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0))
        elif network is not None:
            first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
            hook = first.register_forward_pre_hook(lambda layer, given: self._refuse(given, images))
        try:
            yield
        finally:
            if self.on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)
            elif network is not None:
                hook.remove()
            self.times = self._times() - before
            self.free()

    def _refuse(self, given: tuple[Tensor, ...], images: int) -> None:
        if len(given[0]) > images:
            self.refused += 1
            raise torch.OutOfMemoryError

    def _times(self) -> int:
        return torch.cuda.memory_stats()["num_ooms"] if self.on_gpu else self.refused


# ---------------------------------------------------------------- the checks


def logits(bench: Bench) -> str:
    """A network gives the logits that it gives on the CPU."""
    run, samples = bench.train(epochs=1, name="logits"), read_dataset(bench.data).val
    assert samples is not None
    found = [
        predict(load(run.path, device=device), samples, Inference(workers=0), "val").logits
        for device in ("cpu", bench.device)
    ]
    worst = float((found[0] - found[1]).abs().max())
    assert worst < SAME_LOGITS, f"logits differ by {worst:.1e}"
    return f"logits of {len(samples)} images differ by at most {worst:.1e}"


def training(bench: Bench) -> str:
    """The first steps have the losses that they have on the CPU, frozen and fine-tuned."""
    texts = []
    for mode in ("finetune", "feature-extractor"):
        solver = "auto" if mode == "finetune" else "sgd"
        on = [
            bench.losses(5, mode=mode, head_solver=solver, name=f"{mode}-{i}", device=device)
            for i, device in enumerate(("cpu", bench.device))
        ]
        worst = max(abs(a - b) for a, b in zip(*on, strict=True))
        assert worst < SAME_LOSSES, f"{mode}: {on}"
        assert on[1][0] != on[1][-1]
        texts.append(f"{mode}: losses of {len(on[0])} steps differ by at most {worst:.1e}")
    return "; ".join(texts)


def precision(bench: Bench) -> str:
    """In 16 bits the loss falls, and evaluating the run gives the scores that it was saved with."""
    texts = []
    for dtype in ("bfloat16", "float16"):
        run = bench.train(precision=dtype, name=dtype, epochs=4)
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        first, last = rows[0]["train_loss"], rows[-1]["train_loss"]
        assert last < first, f"{dtype}: the loss went from {first:.3f} to {last:.3f}"
        samples, saved = read_dataset(bench.data).val, run.metrics().val
        assert samples is not None
        found = predict(load(run.path, device=bench.device), samples, Inference(workers=0), "val")
        other = abs(found.score().loss - saved.loss)
        assert other < 0.02, f"{dtype}: evaluated in float32 the loss is another by {other:.3f}"
        texts.append(f"{dtype}: loss {first:.3f} → {last:.3f}, evaluated within {other:.4f}")
    return "; ".join(texts)


def resume(bench: Bench) -> str:
    """A run that was stopped and goes on ends with the weights of one that was not."""
    whole = bench.train(name="whole", ema=0.9)
    events = []
    for event in run_plan(
        prepare(bench.config(name="stopped", ema=0.9)),
        stop=lambda: sum(isinstance(event, StepDone) for event in events) == 2,
    ):
        events.append(event)
    stopped = events[-1]
    run: Run = stopped.run
    saved = run.load_checkpoint()
    assert saved is not None and saved.step == 2
    for _ in run_plan(prepare(run.config(), run), run):
        pass
    one, other = (r.load_checkpoint() for r in (whole, run))
    assert one is not None and other is not None and one.step == other.step > 2
    worst = max(float((t - other.tensors[n]).abs().max()) for n, t in one.tensors.items())
    assert worst < SAME_WEIGHTS, f"weights differ by {worst:.1e}"
    return "the same, bit for bit" if worst == 0 else f"weights differ by at most {worst:.1e}"


def out_of_memory(bench: Bench) -> str:
    """A step that does not fit is computed in parts, with the same loss."""
    memory, size = Memory(bench), bench.config().training.images_per_step
    settings = {"batchnorm": "frozen"}  # else BatchNorm sees other batches
    memory.free()
    expected = bench.losses(3, name="roomy", **settings)
    plan = prepare(bench.config(name="tight", **settings))
    with memory.limited(memory.peak() * 6 // 10, plan.classifier.network, size // 2):
        events = run_plan(plan)
        done = (event for event in events if isinstance(event, StepDone))
        found = [float(event.loss) for event in islice(done, 3)]
        events.close()
    assert memory.times > 0, "memory did not run out"
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    assert worst < SAME_LOSSES, f"{expected} and {found}"
    return f"ran out {memory.times} times; losses of 3 steps differ by at most {worst:.1e}"


def batch_size(bench: Bench) -> str:
    """`--batch-size auto` is smaller where memory is."""
    memory, config = Memory(bench), bench.config(batch_size="auto")
    memory.free()
    plan = prepare(config)
    roomy, network = plan.config.training.batch_size, plan.classifier.network
    if not memory.on_gpu:
        return f"{roomy}; the memory of a CPU is not tried"
    pixels = torch.zeros(roomy, 3, *[plan.classifier.input_spec.size] * 2, device=plan.device)
    train_mode(network)
    outputs = network(pixels)
    # What the backward pass needs. The peak holds more that a step can do without: cuDNN takes
    # whatever working memory there is, and the allocator keeps what was freed.
    kept = torch.cuda.memory_allocated()
    del plan, network, pixels, outputs
    with memory.limited(kept * 9 // 10):
        tight = prepare(config).config.training.batch_size
    assert tight < roomy, f"{tight} of {roomy}"
    return f"{roomy}, and {tight} in nine tenths of what its forward pass keeps"


def inference(bench: Bench) -> str:
    """Prediction of a batch that does not fit is computed in parts, with the same logits."""
    memory, samples = Memory(bench), read_dataset(bench.data).train
    network = load(bench.train(epochs=1, name="inference").path, device=bench.device)

    def compute() -> Tensor:
        views = EvaluationViews(network.input_spec)
        batches = view_batches(samples.paths, views, Loading(len(samples), 0))
        return collect(predict_batches(network.network, batches), samples.paths)

    memory.free()
    expected = compute()
    with memory.limited(memory.peak() * 6 // 10, network.network, len(samples) // 3):
        found = compute()
    assert memory.times > 0, "memory did not run out"
    worst = float((found - expected).abs().max())
    assert worst < SAME_LOGITS, f"logits differ by {worst:.1e}"
    return f"ran out {memory.times} times; logits differ by at most {worst:.1e}"


def processes(bench: Bench) -> str:
    """Two processes, each with its GPU, take the steps of one."""
    if bench.full and torch.cuda.device_count() < 2:
        raise SkippedError(f"there is {torch.cuda.device_count()} GPU")
    settings = bench.config(name="run", batchnorm="frozen").to_dict()
    del settings["runs_dir"]
    case = bench.folder / "many.json"
    case.write_text(json.dumps(settings))
    started = start_torchrun(
        2, "-m", "tools.gpu", "--follow", case, "--output", bench.folder / "many"
    )
    _, said = started.communicate()
    assert started.returncode == 0, said
    one = bench.folder / "one"
    one.mkdir()
    follow(settings, one)
    worst, steps = 0.0, sorted(one.glob("*.safetensors"))
    for file in steps:
        alone, together = load_file(file), load_file(bench.folder / "many" / file.name)
        worst = max(worst, *(float((alone[n] - together[n]).abs().max()) for n in alone))
    assert steps and worst < SAME_WEIGHTS, f"weights differ by {worst:.1e}"
    return f"weights after each of {len(steps)} steps differ by at most {worst:.1e}"


def speed(bench: Bench) -> str:
    """resnet18 fine-tuned from images in memory, beside a plain loop on tensors in memory."""
    images, size, batch = (2048, 224, 64) if bench.full else (16, 32, 8)
    data = bench.folder / "speed"
    draw_images(data / "train", images, size=(size * 4 // 3, size))
    draw_images(data / "val", batch, size=(size * 4 // 3, size), seed=1)
    weights = random_weights(bench.folder / "resnet18", "resnet18")
    workers = len(os.sched_getaffinity(0)) if bench.full and hasattr(os, "sched_getaffinity") else 0
    texts = []
    for dtype in ("float32", "bfloat16") if bench.full else ("float32",):
        job = Job(str(data), str(weights), batch_size=batch, size=size, device=bench.device,
                  bf16=dtype == "bfloat16")  # fmt: skip
        ratios: dict[str, list[float]] = {"a step": [], "an epoch": []}
        for turn in range(3 if bench.full else 1):
            loop = throughput(job, steps=20 if bench.full else 1)
            plain = max(loop["plain"], loop["plain, channels last"])
            config = Config.of(
                data, backbone=f"local-dir:{weights}", device=bench.device, precision=dtype,
                epochs=4 if bench.full else 2, batch_size=batch, image_size=size, cache="ram",
                mode="finetune",
                workers=workers, probe_first=False, runs_dir=bench.folder / "runs",
                name=f"speed-{dtype}-{turn}",
            )  # fmt: skip
            events = [event for event in run_plan(prepare(config)) if isinstance(event, Epoch)]
            ratios["a step"].append(loop["cnnft"] / plain)
            ratios["an epoch"].append(images / min(e.seconds for e in events[1:]) / plain)
        middle = {what: statistics.median(values) for what, values in ratios.items()}
        texts.append(
            f"{dtype}: the plain loop {plain:.0f} images/s; of it a step of cnnft reaches "
            f"{middle['a step']:.2f} and an epoch from images in RAM ({workers} workers) "
            f"{middle['an epoch']:.2f}"
        )
    return "; ".join(texts)


CHECKS: dict[str, Callable[[Bench], str]] = {
    "logits": logits,
    "training": training,
    "precision": precision,
    "resume": resume,
    "out-of-memory": out_of_memory,
    "batch-size": batch_size,
    "inference": inference,
    "processes": processes,
    "speed": speed,
}


# ---------------------------------------------------------------- the program


def absent(device: str) -> str | None:
    """Why there is no such device; None: it is there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"no CUDA device is there (torch {torch.__version__})"
    return None


def run_check(name: str, device: str, folder: Path) -> str:
    """What was found.

    Raises:
        SkippedError: it cannot be made here.
        AssertionError: what is promised does not hold.
    """
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, as on a CPU
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)  # the same sums in the same order
    return CHECKS[name](Bench(device, folder, full=device.startswith("cuda")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--output", type=Path, help="a document with the markers `gpu`")
    parser.add_argument("--follow", type=Path, help=argparse.SUPPRESS)  # for `processes`
    options = parser.parse_args()
    if options.follow:
        options.output.mkdir(exist_ok=True)
        follow(json.loads(options.follow.read_text()), options.output)
        return
    if reason := absent(options.device):
        print(f"skipped: {reason}")
        return
    lines, failed = ["| | | |", "|---|---|---|"], False
    for name in options.only:
        with tempfile.TemporaryDirectory() as place:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which deterministic sums need
            os.environ["CNNFT_CACHE"] = str(Path(place, "cache"))
            try:
                result, found = "ok", run_check(name, options.device, Path(place))
            except SkippedError as reason:
                result, found = "skipped", str(reason)
            except Exception as error:
                traceback.print_exc()
                result, found = "**failed**", f"{type(error).__name__}: {error}".splitlines()[0]
                failed = True
        print(f"{name}: {result}: {found}", flush=True)
        what = (CHECKS[name].__doc__ or "").rstrip(".")
        lines.append(f"| {what} | {result} | {found} |")
    versions = environment(torch.device(options.device))
    told = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("threads", "processes"))
    text = "\n".join([*lines, "", f"{datetime.date.today()}; {machine()}; {told}."])
    if options.output:
        fill(options.output, "gpu", text)
    sys.exit(failed)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*TF32.*")
    main()
