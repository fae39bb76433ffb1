"""Train as told and keep the network after every step; for torchrun, or alone.

python -m tools.each_step CASES.json OUT      CASES: name -> fields of Config
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from cnnft.config.schema import Config
from cnnft.machine import distributed
from cnnft.training.finetune import run_plan
from cnnft.training.plan import prepare
from cnnft.training.step import StepDone


def start_torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node processes arguments` from the root of the repository."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), *map(str, arguments),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that `pid` started (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def follow(settings: dict[str, object], folder: Path) -> None:
    plan = prepare(Config.of(**settings, runs_dir=folder))
    for event in run_plan(plan):
        if isinstance(event, StepDone) and distributed.is_main:
            state = plan.classifier.network.state_dict()
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, folder / f"{event.step}.safetensors")


if __name__ == "__main__":
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, settings in cases.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        follow(settings, out / name)
