"""Help, version and usage errors answer without the heavy libraries."""

import subprocess
import sys

import pytest

PROBE = """
import sys
from cnnft.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
heavy = sorted({"torch", "torchvision", "timm", "numpy", "PIL"} & sys.modules.keys())
print("\\nheavy:", heavy, "code:", code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["finetune", "--help"], 0),
        (["predict", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["export", "--help"], 0),
        (["diff", "--help"], 0),
        (["nonsense"], 2),
        (["finetune", "--nonsense"], 2),
        (["finetune"], 2),
        (["finetune", "data", "--epochs", "0"], 2),
        (["finetune", "data", "--epochs", "many"], 2),
        (["finetune", "data", "--mode", "both"], 2),
        (["predict", "x.jpg"], 2),
        (["diff", "run"], 2),
        (["predict", "x.jpg", "-m", "run", "--tta", "all"], 2),
        (["export", "run", "--format", "pickle"], 2),
        (["backbones"], 0),
        (["backbones", "resnet*", "--json"], 0),
        (["backbones", "nonsense"], 2),
    ],
)
def test_no_heavy_import(arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == f"heavy: [] code: {code}", done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_standard_output_is_no_error():
    """As a daemon may start a training: Python has None for it."""
    command = f"{sys.executable} -m cnnft recipes >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
