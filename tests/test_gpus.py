"""What is said of GPUs that are there and cannot be used, and what is chosen for the others. No GPU is needed."""

import ctypes
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerControl, TrainerState

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.model import gpus
from pipeline.model.loading import pick_device, pick_dtype
from pipeline.training.trainer import UnpagedStates

GPU = torch.device("cuda")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process see a machine with an NVIDIA GPU: torch cannot use the GPU, for the reason that is given."""
    monkeypatch.setattr(gpus, "CARDS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def of(driver: tuple[int, int] | None, cuda: str | None = "13.0", card: str = "0x10de", init: str = "") -> None:
        def initialize() -> None:
            if init:
                raise RuntimeError(init)

        def load(name: str) -> Any:
            if driver is None:
                raise OSError(name)
            number, error = driver
            count = SimpleNamespace(cuInit=lambda _: error, cuDeviceGetCount=lambda at: set_number(at, number))
            return count

        (tmp_path / "0000:01:00.0").mkdir()
        (tmp_path / "0000:01:00.0/vendor").write_text(f"{card}\n", encoding="ascii")
        (tmp_path / "0000:01:00.0/class").write_text("0x030000\n", encoding="ascii")
        monkeypatch.setattr("torch.version.cuda", cuda)
        monkeypatch.setattr("torch.cuda.init", initialize)
        monkeypatch.setattr(ctypes, "CDLL", load)

    return of


def set_number(at: Any, number: int) -> int:
    at._obj.value = number
    return 0


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"driver": (1, 0), "cuda": None}, r"torch .* is built without CUDA: install the torch of requirements\.txt"),
        (
            {
                "driver": (1, 0),
                "init": "The NVIDIA driver on your system is too old (found version 12020). Update\nit.",
            },
            r"The NVIDIA driver on your system is too old \(found version 12020\)\. Update, or set base\.device to cpu",
        ),
        ({"driver": (1, 0)}, r"torch\.cuda\.is_available\(\) is false: run python -m torch\.utils\.collect_env"),
        ({"driver": (0, 803)}, r"NVIDIA's driver fails with error 803: restart the machine"),
        ({"driver": None}, r"NVIDIA's driver is missing: install version 580 or later; start a container with --gpus"),
        ({"driver": (0, 100)}, r"NVIDIA's driver is missing"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_never_left_idle_in_silence(
    machine: Any, found: dict[str, Any], why: str, wanted: str
) -> None:
    machine(**found)
    with pytest.raises(UserError, match=f"^this machine has an NVIDIA GPU that cannot be used: {why}"):
        pick_device(wanted)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("found", [{"driver": None}, {"driver": (0, 100)}])
def test_a_gpu_that_the_user_hides_is_not_missed(
    machine: Any, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    machine(**found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device("auto") == torch.device("cpu")


def test_without_an_nvidia_gpu_the_cpu_is_used(machine: Any) -> None:
    machine(driver=None, card="0x8086")
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"base\.device is cuda, but torch finds no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("other", ["mps", "xpu", "hpu"])
def test_a_gpu_that_is_not_used_is_named_and_the_cpu_is_taken(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    machine(driver=None, card="0x8086")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device(other))
    assert pick_device("cpu") == torch.device("cpu") and not capsys.readouterr().out
    assert pick_device("auto") == torch.device("cpu")
    assert f"auto takes the CPU, because this pipeline does not compute on {other}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"base\.device is cuda, but torch finds no GPU of NVIDIA or AMD"):
        pick_device("cuda")


def test_a_device_that_the_pipeline_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("device: auto", "device: mps"), encoding="utf-8")
    with pytest.raises(UserError, match=r"base\.device is 'mps': input should be 'auto', 'cpu' or 'cuda'$"):
        check(tmp_path / "params.yaml")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see one GPU of a compute capability."""

    def of(major: int, minor: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_80", "sm_120", "compute_120"])
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla")

    return of


def test_a_gpu_that_is_too_old_for_torch_is_refused_by_name(card: Any) -> None:
    card(6, 1)
    with pytest.raises(UserError, match=r"Tesla has compute capability 6\.1, and torch .* needs 7\.5 or more"):
        pick_device("auto")
    card(12, 1)
    assert pick_device("auto") == GPU


def test_an_amd_gpu_is_accepted_with_torchs_rocm_build(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card(9, 4)
    monkeypatch.setattr("torch.version.hip", "7.2")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["gfx942", "gfx1100"])
    assert pick_device("auto") == pick_device("cuda") == GPU and pick_dtype("auto", GPU) == torch.bfloat16


def test_before_ampere_arithmetic_is_in_float32(card: Any) -> None:
    card(7, 5)
    assert pick_device("auto") == GPU and pick_dtype("auto", GPU) == torch.float32
    with pytest.raises(UserError, match=r"base\.compute_dtype is bfloat16, which a GPU before Ampere"):
        pick_dtype("bfloat16", GPU)
    card(8, 0)
    assert pick_dtype("auto", GPU) == pick_dtype("bfloat16", GPU) == torch.bfloat16


def test_what_triton_compiles_with_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"needs a C compiler and .*Python\.h: apt-get install gcc python3-dev"):
        gpus.require_compiler()
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch()
    (tmp_path / "gcc").chmod(0o755)
    gpus.require_compiler()


def test_a_resumed_paged_optimizer_fetches_no_pages_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of states that were loaded onto a GPU, which several processes do."""
    fetched: list[torch.Tensor] = []
    monkeypatch.setattr("bitsandbytes.functional.prefetch_tensor", lambda state, *_: fetched.append(state))
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = bitsandbytes.optim.PagedAdamW8bit([weight])
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
    on_gpu.is_paged = True  # as saved
    optimizer.state[weight] = {"step": 1, "state1": on_gpu}
    optimizer.prefetch_state(weight)
    assert len(fetched) == 1
    UnpagedStates().on_train_begin(None, TrainerState(), TrainerControl(), optimizer=optimizer)
    optimizer.prefetch_state(weight)
    assert len(fetched) == 1
