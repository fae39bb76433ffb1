"""The whole tool on sample_data/: train in both modes, evaluate, predict, export. See `make demo`.

Every command is printed before it runs, so that it can be repeated by hand. Beside the built-in
backbone the same network trains from random weights: what pretraining is worth shows there.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

DATA = "sample_data"
RUNS = Path("runs", "demo")

# Chosen by accuracy on sample_data/val, then by loss, for the built-in backbone, among: 5 and 10
# epochs, recipes fast and standard, --head-lr 0.5; of a frozen backbone --head-lr 0.1, 0.3 and 1.
MODES = {
    "feature-extractor": ["--epochs", "15", "--head-lr", "0.3"],
    "finetune": ["--epochs", "10"],
}


def cnnft(*arguments: str, show: bool = True) -> str:
    """Run a command, printing it; returns its standard output, which `show` prints too."""
    print(f"\n\033[1m$ cnnft {' '.join(arguments)}\033[0m", flush=True)
    command = [sys.executable, "-m", "cnnft", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if show:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train(name: str, mode: str, *options: str) -> str:
    """Train one run, replacing that of an earlier demo; returns its directory."""
    cnnft(
        "finetune", DATA, "--backbone", "builtin", "--mode", mode, *MODES[mode], *options,
        "--runs-dir", str(RUNS), "--name", name, "--force", show=False,
    )  # fmt: skip
    return str(RUNS / name)


def main() -> None:
    started = time.monotonic()
    built_in = {mode: train(mode, mode) for mode in MODES}
    random = {mode: train(f"{mode}-random", mode, "--no-pretrained", "--quiet") for mode in MODES}
    training = time.monotonic() - started

    scores = {}
    for runs in (built_in, random):
        for run in runs.values():
            out = cnnft("evaluate", DATA, "--split", "test", "-m", run, "--json", show=False)
            scores[run] = json.loads(out)

    images = [str(min(folder.glob("*.jpg"))) for folder in sorted(Path(DATA, "test").iterdir())]
    cnnft("predict", *images, "-m", built_in["finetune"], "--tta", "five-crop", "--top", "2")
    head = str(RUNS / "leaves.head.safetensors")
    cnnft("export", built_in["feature-extractor"], "--format", "head", "--output", head)

    some = scores[built_in["finetune"]]
    print(f"\nAccuracy on the {some['n']} test images (chance: {some['chance']:.1%}):\n")
    print(f"{'mode':<20}{'built-in backbone':>28}{'random weights':>28}")
    for mode in MODES:
        cells = [scores[runs[mode]] for runs in (built_in, random)]
        texts = [
            f"{s['accuracy']:.1%} [{s['interval95'][0]:.0%}, {s['interval95'][1]:.0%}]"
            for s in cells
        ]
        print(f"{mode:<20}{texts[0]:>28}{texts[1]:>28}")
    size = Path(head).stat().st_size
    print(
        f"\nFour runs trained in {training:.0f} s; they are in {RUNS}/. The trained head alone is "
        f"in {head} ({size / 1000:.0f} kB).\nNext, your own images, one folder per class:\n\n"
        "    .venv/bin/cnnft finetune PATH/TO/YOUR/IMAGES --backbone builtin\n"
    )


if __name__ == "__main__":
    main()
