"""The limit: images per second of the network alone, on batches that are in memory as tensors.

    python -m benchmarks.limit JOB [--steps 6]       JOB: the fields of benchmarks.peers.Job as JSON

"plain" is forward, backward and SGD, "forward" is inference; each also with channels last in
memory, and with the memory that is freed kept by the process. "tutorial" and "cnnft" are those two
training loops as they are, fed from memory: what they take beyond that on a folder of images is
loading. They take turns. Prints the medians as JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ConstantLR

from benchmarks import tutorial
from benchmarks.peers import Job
from cnnft.data.sampler import KeyedBatches
from cnnft.machine.devices import keep_freed_memory, place
from cnnft.training.state import TrainState
from cnnft.training.step import train

Batch = tuple[Tensor, Tensor]
_STEPS = 10_000
"""Of one epoch of cnnft, which is not to end."""
Kinds = dict[str, tuple[Callable[[Batch], object], Batch]]


def plain(network: nn.Module) -> Callable[[Batch], object]:
    optimizer = tutorial.make_optimizer(network)

    def step(batch: Batch) -> None:
        network.train()
        optimizer.zero_grad()
        cross_entropy(network(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def forward(network: nn.Module) -> Callable[[Batch], object]:
    @torch.inference_mode()
    def step(batch: Batch) -> None:
        network.eval()
        network(batch[0])

    return step


def by_hand(network: nn.Module) -> Callable[[Batch], object]:
    optimizer = tutorial.make_optimizer(network)
    scheduler = ConstantLR(optimizer)
    return lambda batch: tutorial.train_epoch(network, [batch], optimizer, scheduler)


def cnnft(network: nn.Module, images: int) -> Callable[[Batch], object]:
    optimizer = tutorial.make_optimizer(network)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    objective = partial(cross_entropy, reduction="sum")

    given: list[Batch] = []
    keys = KeyedBatches(images * _STEPS, images, seed=0, epochs=1)
    state = TrainState(network, optimizer, lambda step: 1.0, keys)
    events = train(state, iter(given.pop, None), objective)

    def step(batch: Batch) -> None:
        given.append(batch)
        next(events)

    return step


def throughput(job: Job, steps: int) -> dict[str, float]:
    """Images per second."""
    pixels = torch.randn(job.batch_size, 3, job.size, job.size, device=job.device)
    labels = torch.randint(job.classes, (job.batch_size,), device=job.device)
    batch, strided = (pixels, labels), (pixels.to(memory_format=torch.channels_last), labels)

    def network() -> nn.Module:
        return job.network(job.classes)

    def strided_network() -> nn.Module:
        return network().to(memory_format=torch.channels_last)

    def turns(kinds: Kinds) -> dict[str, float]:
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(steps + 1):
            for kind, (step, images) in kinds.items():
                start = time.perf_counter()
                with job.autocast():
                    step(images)
                if job.device == "cuda":
                    torch.cuda.synchronize()
                seconds[kind].append(time.perf_counter() - start)
        warm = {kind: times[1:] for kind, times in seconds.items()}
        return {kind: job.batch_size / statistics.median(times) for kind, times in warm.items()}

    found = turns({
        "plain": (plain(network()), batch),
        "plain, channels last": (plain(strided_network()), strided),
        "forward": (forward(network()), batch),
        "forward, channels last": (forward(strided_network()), strided),
        "tutorial": (by_hand(network()), batch),
    })  # fmt: skip
    if job.device == "cpu":
        keep_freed_memory()  # for good
    return found | turns({
        "plain, memory kept": (plain(network()), batch),
        "plain, channels last, memory kept": (plain(strided_network()), strided),
        "forward, channels last, memory kept": (forward(strided_network()), strided),
        "cnnft": (cnnft(place(network(), torch.device(job.device)), job.batch_size), batch),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", type=json.loads)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print(json.dumps(throughput(Job(**options.job), options.steps)))


if __name__ == "__main__":
    main()
