"""What tools/gpu.py tries on a GPU: there, and, small, on the CPU, so that it can be relied on."""

from pathlib import Path

import pytest
import torch

from tools.gpu import CHECKS, SkippedError, run_check

SLOW = ("processes", "speed")  # test_distributed and test_benchmarks take these ways too


@pytest.fixture(autouse=True)
def settings_of_torch() -> None:
    """`run_check` sets them for a process of its own."""
    tf32 = torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision(precision)


@pytest.mark.filterwarnings("ignore:.*TF32")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CHECKS],
)
def test_the_check_itself_on_the_cpu(name: str, tmp_path: Path) -> None:
    assert run_check(name, "cpu", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
@pytest.mark.filterwarnings("ignore:.*TF32")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    try:
        assert run_check(name, "cuda", tmp_path)
    except SkippedError as reason:
        pytest.skip(str(reason))
