"""The base in NF4, with or without an adapter, on the device that is there."""

import ctypes
import os
from pathlib import Path
from typing import Literal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it

import bitsandbytes as bnb
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.common.errors import UserError

KEPT = 2**23  # glibc gives freed pieces of this many bytes and more back
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def reproducible(seed: int, threads: int) -> None:
    """Same seed, threads and machine: same bytes."""
    torch.set_num_threads(threads)
    transformers.set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # takes a fifth of a step, to show the bugs of kernels


def pick_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("base.device is cuda, but torch sees no GPU here: set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, wanted)


def pick_optimizer(wanted: str, device: torch.device) -> str:
    if wanted == "auto":
        return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"
    return wanted


def pick_checkpointing(wanted: bool | Literal["auto"], device: torch.device) -> bool:
    return device.type == "cuda" if wanted == "auto" else wanted


def pick_offloading(wanted: bool, checkpointing: bool, device: torch.device) -> bool:
    return wanted and checkpointing and device.type == "cuda"


def load_quantized(
    folder: Path, device: torch.device, dtype: torch.dtype, quant_storage: torch.dtype = torch.uint8
) -> PreTrainedModel:
    """The base with its linear layers in NF4 with double quantization (https://arxiv.org/abs/2305.14314), the rest and
    all arithmetic in `dtype`. The bits of NF4 are kept as if they were of type `quant_storage`."""
    give_back_from(2**20)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=nf4(dtype, quant_storage),
    )
    give_back_from(KEPT)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Otherwise the first evaluation on a CPU with AVX512-BF16 repacks the weights, and training stops learning.
            module.support_avx512bf16_for_cpu = False
    return model


def nf4(dtype: torch.dtype, quant_storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=quant_storage,
    )


def give_back_from(size: int) -> None:
    """Let glibc give memory back to the system when a piece of `size` bytes (32 MiB at most) or more is freed.

    Left to itself, it keeps up to the whole base in 32 bits after loading: quantized weights lie in between. 8 MiB
    keep small tensors fast in training. Other libraries than glibc have no such setting.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def load_merged(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """On a GPU too small for its 16-bit weights, the rest of them stays in the machine's memory."""
    place = "auto" if device.type == "cuda" else device
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=place)


def load_tuned(folder: Path, adapter: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The base in NF4 with the trained adapter on it, as it was at the end of training."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_quantized(folder, device, dtype), adapter)
