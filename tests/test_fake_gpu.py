"""The true training step on a GPU that does not exist: no tensor is on the wrong device, and memory is as estimated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from programs import LIGER, compiler

from bench.caching_allocator import MIB, Allocator, OutOfMemory, reserved

with_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler: apt-get install g++")
with_liger = pytest.mark.skipif(not LIGER.exists(), reason="Liger is not installed: make .venv/.liger")
WITHIN = 0.05  # of the estimate
WITHOUT_OFFLOADING = ["--", "train.activation_offloading=false"]


def counted(*arguments: str, packages: Path = ROOT) -> list[dict[str, Any]]:
    """bench.gpu_counts, with models of the true width and two layers, and with further `packages`."""
    command = [sys.executable, "-m", "bench.gpu_counts", "--layers", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@with_compiler
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["--lengths", "2048"], 1),
        (["--models", "Llama 3.1 8B", "Gemma 2 9B", "--lengths", "512", "--rows", "4", *WITHOUT_OFFLOADING], 4),
        (["--models", "Llama 3.1 8B", "--lengths", "512", "--", "lora.use_dora=true"], 1),
        (["--models", "Llama 3.1 8B", "--lengths", "512", "--", "lora.modules_to_save=[norm]"], 1),
        (["--models", "Llama 3.1 8B", "--lengths", "512", "--processes", "2"], 1),
        (["--models", "Llama 3.1 8B", "--lengths", "512", "--rows", "2", "--", "align.method=orpo"], 2),
    ],
)
def test_the_step_of_each_family_needs_the_estimated_memory_and_waits_once_for_the_optimizer(
    arguments: list[str], rows: int
) -> None:
    for case in counted(*arguments):
        assert case["rows"] == rows and case["waits"]["synchronize"] == 1
        assert case["estimated"] == pytest.approx(case["allocated"], rel=WITHIN), case


@with_compiler
@with_liger
def test_ligers_kernels_take_two_thirds_of_the_launches_and_less_memory() -> None:
    case = ("--models", "Llama 3.1 8B", "--lengths", "512")
    [plain], [liger] = counted(*case), counted(*case, packages=LIGER)
    assert liger["launched"] < 0.7 * plain["launched"]
    assert liger["allocated"] < plain["allocated"]


@with_compiler
def test_a_tensor_on_the_wrong_device_is_found() -> None:
    program = (
        "import bench.fake_gpu, torch\n"
        "with bench.fake_gpu.fake_gpu():\n"
        "    torch.ones(2, device='cuda') + torch.ones(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "Expected all tensors to be on the same device" in done.stderr.replace("\n", " ")


def test_the_allocator_reserves_whole_segments_and_uses_them_again() -> None:
    allocator = Allocator(expandable=False)
    small = [allocator.allocate(1000) for _ in range(3)]
    assert allocator.reserved == 2 * MIB
    large = allocator.allocate(5 * MIB)
    assert allocator.reserved == 22 * MIB
    allocator.free(large)
    allocator.allocate(19 * MIB)  # all of the segment, because less than 1 MiB is not split off
    assert allocator.reserved == 22 * MIB
    allocator.allocate(15 * MIB)
    assert allocator.reserved == 38 * MIB  # of its own size, rounded to 2 MiB
    for block in small:
        allocator.free(block)
    [(size, _, _)] = allocator.free_blocks[True]
    assert size == 2 * MIB


def test_expandable_segments_lose_no_memory_to_rows_of_growing_length() -> None:
    """Each tensor is larger than all before it, so no segment of a tensor is large enough for the next."""
    growing = [event for number in range(10) for event in ((number, (20 + 10 * number) * MIB), (number, -1))]
    assert reserved(growing, expandable=False) == sum(20 + 10 * number for number in range(10)) * MIB
    assert reserved(growing, expandable=True) == 120 * MIB  # the largest, rounded to 20 MiB


def test_memory_that_is_not_used_is_given_back_before_the_gpu_is_full() -> None:
    one_after_another = [(0, 40 * MIB), (0, -1), (1, 60 * MIB), (1, -1)]
    assert reserved(one_after_another, expandable=False, limit=64 * MIB) == 60 * MIB
    with pytest.raises(OutOfMemory):
        reserved([(0, 40 * MIB), (1, 40 * MIB)], expandable=True, limit=64 * MIB)
