"""Trains the backbone on the generated world: `python -m research.pretrain.train --help`."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from . import network
from .bank import BankSpec, load
from .objective import Objective
from .world import World

STAGES = ((0.62, 64), (0.88, 96), (1.0, 128))
"""(up to this share of the steps, image size)."""
BATCH = 32
"""Images per process and step."""
WARMUP_STEPS = 800
DECAY_SHARE = 0.25
EMA_DECAY = 0.999
CHECKPOINT = "checkpoint.pt"
REPORT_EVERY = 200


@dataclass(frozen=True)
class Settings:
    steps: int
    output: Path
    bank: Path
    seed: int = 0
    processes: int = 2
    device: str = "cpu"
    precision: str = "bf16"
    lr: float = 3e-3
    save_seconds: float = 60.0


@dataclass
class Progress:
    """What a run has used so far, over all its interruptions."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warmup, then constant, then linear decay to zero over the last DECAY_SHARE of `steps`."""
    rising = (step + 1) / WARMUP_STEPS
    falling = (steps - step) / (DECAY_SHARE * steps)
    return peak * min(1.0, rising, falling)


def image_size(step: int, steps: int) -> int:
    """Pixels at `step`."""
    return next(size for share, size in STAGES if step < share * steps)


class Trainer:
    """Everything that one process holds: networks, optimizer, average, progress."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.device = torch.device(settings.device)
        bank = load(BankSpec(), settings.bank, workers=settings.processes)
        self.world = World(bank, settings.seed, self.device)
        torch.manual_seed(settings.seed)
        self.model = network.build(self.device)
        self.objective = Objective(self.world.classes, self.model.num_features).to(self.device)
        self.parameters = [*self.model.parameters(), *self.objective.parameters()]
        self.average = [p.detach().clone() for p in self.model.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
        self.progress = Progress()

    def step(self) -> dict[str, Tensor]:
        """One optimizer step on this process's batch; gradients are averaged over processes."""
        s, at = self.settings, self.progress.step
        size = image_size(at, s.steps)
        with torch.no_grad():
            batch = self.world.batch(at, self.rank, BATCH, size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            cells = self.model.forward_features(network.normalise(batch.images))
        loss, seen = self.objective(cells.float(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters, s.processes)
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(at, s.steps, s.lr)
        self.optimizer.step()
        weight = 1 - min(EMA_DECAY, (1 + at) / (10 + at))
        with torch.no_grad():
            for mean, parameter in zip(self.average, self.model.parameters(), strict=True):
                mean.lerp_(parameter, weight)
        self.progress.step += 1
        self.progress.images += BATCH * s.processes
        return seen

    def save(self) -> None:
        """Written whole or not at all."""
        path = self.settings.output / CHECKPOINT
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "progress": asdict(self.progress),
            "seed": self.settings.seed,
            "processes": self.settings.processes,
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def resume(self) -> None:
        path = self.settings.output / CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("seed", "processes"):
            if state[name] != getattr(self.settings, name):
                raise SystemExit(f"{path} was trained with {name} {state[name]}")
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [mean.detach() for mean in state["average"]]
        self.progress = Progress(**state["progress"])


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """One all-reduce of all gradients laid end to end: far fewer messages than one per tensor."""
    if processes == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    pieces = (flat / processes).split([g.numel() for g in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def train(rank: int, settings: Settings) -> None:
    """The loop of one process."""
    if settings.device == "cpu":
        torch.set_num_threads(1)
    if settings.processes > 1:
        rendezvous = f"file://{(settings.output / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=settings.processes)
    trainer = Trainer(settings, rank)
    trainer.resume()
    progress, saved, sums, since = trainer.progress, time.monotonic(), {}, 0
    tick = time.monotonic()
    while progress.step < settings.steps:
        seen = trainer.step()
        progress.seconds += time.monotonic() - tick
        tick = time.monotonic()
        since += 1
        sums = {k: sums.get(k, 0) + v for k, v in seen.items()}
        if progress.step % REPORT_EVERY == 0 or progress.step == settings.steps:
            if rank == 0:
                report(settings, progress, {k: float(v) / since for k, v in sums.items()})
            sums, since = {}, 0
        if rank == 0 and tick - saved > settings.save_seconds:
            trainer.save()
            saved = time.monotonic()
    if rank == 0:
        trainer.save()
    if settings.processes > 1:
        dist.destroy_process_group()


def report(settings: Settings, progress: Progress, means: dict[str, float]) -> None:
    """One line to the screen, one JSON object to history.jsonl."""
    row = {**asdict(progress), "size": image_size(progress.step - 1, settings.steps), **means}
    with (settings.output / "history.jsonl").open("a") as file:
        file.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
    shown = ("loss", "shape_acc", "kind_acc", "lobes_acc", "back_texture_acc", "back_family_acc")
    shown += ("fore_palette_acc", "descriptor", "dense", "mask", "colours")
    figures = "  ".join(f"{k} {means[k]:.3f}" for k in shown)
    head = f"step {progress.step}/{settings.steps}  {progress.images} images"
    print(f"{head}  {progress.seconds:.0f} s  {row['size']} px  {figures}", flush=True)


def parse() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True, help="may change until decay begins")
    parser.add_argument("--output", type=Path, required=True, help="resumes from what is there")
    parser.add_argument("--bank", type=Path, required=True, help="folder that caches the bank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with --processes 1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    settings = parse()
    settings.output.mkdir(parents=True, exist_ok=True)
    load(BankSpec(), settings.bank, workers=settings.processes)  # once, before processes compete
    (settings.output / "rendezvous").unlink(missing_ok=True)
    if settings.processes == 1:
        train(0, settings)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        mp.spawn(train, (settings,), settings.processes)


if __name__ == "__main__":
    main()
