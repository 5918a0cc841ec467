"""Which GPUs this machine has, and what these can compute."""

import ctypes
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch

from pipeline.common.errors import UserError

CARDS = Path("/sys/bus/pci/devices")  # https://docs.kernel.org/PCI/sysfs-pci.html
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor, and beginning of the class
NO_DEVICE = 100  # https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html (CUresult)
HAS_BFLOAT16 = (8, 0)  # compute capability


def require_usable() -> None:
    """Raises UserError if torch cannot use an NVIDIA GPU of this machine that CUDA_VISIBLE_DEVICES does not hide."""
    why = why_too_old() if torch.cuda.is_available() else why_unusable()
    if why:
        raise UserError(f"this machine has an NVIDIA GPU that cannot be used: {why}, or set base.device to cpu")


def why_too_old() -> str | None:
    """Why torch cannot compute on a GPU that it finds, or None.

    The process that only launches trainings asks this too. Asking makes no CUDA context, so no memory of a GPU is held:
    https://github.com/pytorch/pytorch/blob/main/test/test_cuda_primary_ctx.py. The launched processes are new programs.
    """
    if torch.version.hip:  # AMD's GPUs have names instead of compute capabilities
        return None
    oldest = min(int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list())
    for gpu in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(gpu)
        if 10 * major + minor < oldest:
            return (
                f"{torch.cuda.get_device_name(gpu)} has compute capability {major}.{minor}, and torch "
                f"{torch.__version__} needs {oldest / 10} or more: choose another GPU with CUDA_VISIBLE_DEVICES"
            )
    return None


def why_unusable() -> str | None:
    """Why torch sees no GPU, or None if the machine has none."""
    gpus, error = asked_driver()
    if error not in (0, NO_DEVICE):
        return f"NVIDIA's driver fails with error {error}: restart the machine if the driver was updated"
    if gpus and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install the torch of requirements.txt from PyPI"
    if gpus:
        try:
            torch.cuda.init()
        except RuntimeError as refusal:
            return str(refusal).strip().splitlines()[0].rstrip(".")
        return "torch.cuda.is_available() is false: run python -m torch.utils.collect_env"
    if "CUDA_VISIBLE_DEVICES" not in os.environ and has_card():
        return "NVIDIA's driver is missing: install version 580 or later; start a container with --gpus all"
    return None


def asked_driver() -> tuple[int, int]:
    """The number of GPUs that NVIDIA's driver gives this process, and the driver's error; (0, 0) without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    gpus = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(gpus))
    return gpus.value, error


def has_card() -> bool:
    return any(
        vendor.read_text(encoding="ascii").strip() == NVIDIA
        and vendor.with_name("class").read_text(encoding="ascii").startswith(DISPLAY)
        for vendor in CARDS.glob("*/vendor")
    )


def multiplies_bfloat16() -> bool:
    """Whether all GPUs multiply in bfloat16, and have kernels of attention in bfloat16."""
    gpus = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(gpu) >= HAS_BFLOAT16 for gpu in gpus)


def require_compiler() -> None:
    """Triton, which computes TRL's loss on a GPU, compiles a small C file:
    https://github.com/triton-lang/triton/blob/main/python/triton/runtime/build.py

    Raises:
        UserError: there is no compiler, or no header file of Python.
    """
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if header.exists() else [str(header)]
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = ["a C compiler", *missing]
    if missing:
        raise UserError(
            f"training on a GPU needs {' and '.join(missing)}: apt-get install gcc python3-dev, or set base.device to "
            "cpu"
        )
