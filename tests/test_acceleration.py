"""What makes computing quicker must not change what is computed."""

import copy
import resource
import subprocess
import sys

import pytest
import timm
import torch

from cnnft.errors import UsageError
from cnnft.machine.devices import choose_precision, place

CPU = torch.device("cpu")


def test_weights_channels_last_are_the_same_weights_and_the_same_function() -> None:
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    placed = place(copy.deepcopy(network), CPU)
    assert placed.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(network.parameters(), placed.parameters(), strict=True):
        assert torch.equal(one, other)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(network(pixels), placed(pixels), rtol=1e-5, atol=1e-6)


PAGES = """
import resource, sys, torch
from cnnft.machine.devices import choose_device, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
choose_device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    before = faults()
    for _ in range(5):
        torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_used_again() -> None:
    def pages(what: str) -> int:
        command = [sys.executable, "-c", PAGES, what]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    in_all = 5 * 4 * 2**24 // resource.getpagesize()
    assert pages("keep") < in_all / 20
    assert pages("library") > in_all / 2  # a process that imports cnnft is left as it is


# ---------------------------------------------------------------- precision


def test_auto_is_float32_where_there_is_no_gpu() -> None:
    assert choose_precision("auto", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"


@pytest.mark.parametrize("bits", [True, False])
def test_auto_is_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch, bits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: bits)
    assert choose_precision("auto", torch.device("cuda")) == ("bfloat16" if bits else "float16")


def test_a_device_that_has_no_such_precision_is_told() -> None:
    with pytest.raises(UsageError, match=r"--precision float16 cannot be used on meta .*float32"):
        choose_precision("float16", torch.device("meta"))


# ---------------------------------------------------------------- compilation


def test_what_cannot_be_compiled_is_one_sentence(cnnft, flat, tmp_path, monkeypatch) -> None:
    from torch._dynamo.exc import Unsupported

    def refuse(network: object) -> object:
        def forward(pixels: torch.Tensor) -> torch.Tensor:
            raise Unsupported("no compiler is here\n\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", refuse)
    outcome = cnnft(
        "finetune", flat, "--backbone=builtin", "--workers=0", "--epochs=1", "--compile",
        "--mode=finetune", "--runs-dir", tmp_path, "--device=cpu", "--image-size=32",
    )  # fmt: skip
    outcome.fails_with(1, "--compile", "no compiler is here", "leave it out")
