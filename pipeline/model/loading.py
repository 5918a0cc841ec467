"""Loads the base, in NF4 or as it is, with or without an adapter, and chooses device and types."""

import ctypes
import os
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it
# Otherwise memory that is reserved in pieces of other sizes is lost to long rows:
# https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.model.bitsandbytes_internals import dequantize_in_use, keep_dequantized, never_repack
from pipeline.model.free_memory import free_memory
from pipeline.model.gpus import multiplies_bfloat16, require_usable
from pipeline.model.skeleton import auto_class, skeleton
from pipeline.model.transformers_internals import use_own_quantizer

KEPT = 2**23  # bytes: during training, glibc returns only larger freed blocks to the system
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def reproducible(seed: int, threads: int) -> None:
    """Make results repeatable to the byte on the same CPU, for the same seed and threads.

    On a GPU, gradients still differ: with `warn_only`, the backward pass of fused attention stays as it is. Without
    `warn_only`, operations that torch has in no deterministic version would end with an error.
    """
    torch.set_num_threads(threads)
    transformers.set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes a fifth of a step


def pick_device(wanted: str) -> torch.device:
    """Raises UserError if there is no GPU and `wanted` is cuda, or if there is one that cannot be used."""
    if wanted == "cpu":
        return torch.device("cpu")
    require_usable()
    if torch.cuda.is_available():  # torch's ROCm build presents AMD's GPUs as cuda
        return torch.device("cuda")
    if wanted == "cuda":
        raise UserError("base.device is cuda, but torch finds no GPU of NVIDIA or AMD: set it to auto or cpu")
    if other := torch.accelerator.current_accelerator(check_available=True):
        print(f"base.device: auto takes the CPU, because this pipeline does not compute on {other.type}")
    return torch.device("cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """On a GPU before Ampere, auto is float32: bfloat16 has no fast kernels there, and float16 overflows in Gemma.

    Raises:
        UserError: `wanted` is bfloat16, which the GPU cannot multiply.
    """
    if wanted == "float32":
        return torch.float32
    multiplies = multiplies_bfloat16() if device.type == "cuda" else cpu_multiplies_bfloat16()
    if wanted == "bfloat16" and device.type == "cuda" and not multiplies:
        raise UserError(
            "base.compute_dtype is bfloat16, which a GPU before Ampere (compute capability 8.0) does not multiply: set "
            "it to auto"
        )
    return torch.bfloat16 if multiplies or wanted == "bfloat16" else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16. Without these, bfloat16 is slower than float32."""
    flags = Path("/proc/cpuinfo")  # https://docs.kernel.org/arch/x86/cpuinfo.html
    return flags.exists() and bool({"amx_bf16", "avx512_bf16"} & set(flags.read_text(encoding="ascii").split()))


def pick_optimizer(wanted: str, device: torch.device) -> str:
    if wanted == "auto":
        return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"
    return wanted


def pick_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Choose the attention for training. On a CPU, the backward pass of SDPA in bfloat16 takes ten times as long as
    that of plain products (torch 2.13)."""
    if device.type == "cpu" and model.dtype == torch.bfloat16:
        model.set_attn_implementation("eager")


def load_base(
    folder: Path, quantization: str, device: torch.device, dtype: torch.dtype, processes: int = 1
) -> PreTrainedModel:
    """The base, in NF4 or not quantized, in one of `processes` on this machine. The arithmetic and the weights that are
    not quantized are in `dtype`.

    On a CPU with enough free memory, the weights in NF4 are kept dequantized: the values are the same, and no step
    dequantizes them again.
    """
    if quantization == "none":
        return load_weights(folder, device, dtype)
    model = load_quantized(folder, device, dtype)
    # Not of `model`, in which packed experts count half.
    if device.type == "cpu" and keeps_dequantized(processes * skeleton(folder).num_parameters(), dtype):
        model = model.dequantize(dtype)
        keep_dequantized(model)
    return model


def without_dropout(model: PreTrainedModel) -> None:
    """Turn off all dropout of the model. If this is a base, lora.dropout alone decides afterwards."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):  # a layer passes the value to a function
                setattr(module, name, 0.0)


def keeps_dequantized(parameters: int, dtype: torch.dtype) -> bool:
    """Whether the dequantized weights of a model take less than half of this machine's free memory."""
    return 2 * parameters * dtype.itemsize < free_memory(torch.device("cpu"))


def load_quantized(
    folder: Path, device: torch.device, dtype: torch.dtype, quant_storage: torch.dtype = torch.uint8
) -> PreTrainedModel:
    """The base with experts in NF4, and with linear layers in NF4 with double quantization
    (https://arxiv.org/abs/2305.14314).

    All other weights and the arithmetic are in `dtype`. `quant_storage` is the type of the tensors that hold NF4 bits.
    """
    use_own_quantizer()
    model = load_weights(folder, device, dtype, nf4(dtype, quant_storage))
    never_repack(model)
    dequantize_in_use(model)
    return model


def load_weights(
    folder: Path, device: torch.device, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The base as its files have it, or quantized."""
    give_back_from(2**20)
    model = auto_class(folder).from_pretrained(
        folder, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    give_back_from(KEPT)
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
    """Make glibc return freed blocks of at least `size` bytes (maximum 32 MiB) to the system.

    By default, after loading, glibc may keep memory for all weights in 32 bits, because quantized weights lie between
    the freed blocks. During training, 8 MiB keep small tensors fast. Other C libraries have no such setting.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def load_merged(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The merged model. Weights that do not fit on the GPU stay in RAM, and each pass moves them to the GPU.

    NF4 would fit, but would be another model than the one that ships.
    """
    device_map = "auto" if device.type == "cuda" else device
    return auto_class(folder).from_pretrained(folder, dtype=dtype, device_map=device_map)


def load_tuned(
    folder: Path, adapter: Path, quantization: str, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The base with the trained adapter, as at the end of training."""
    from peft import PeftModel

    from pipeline.model.peft_internals import adapter_weights

    tuned = PeftModel.from_pretrained(load_base(folder, quantization, device, dtype), adapter, is_trainable=True)
    for weight in adapter_weights(tuned).values():
        weight.data = weight.data.to(dtype)  # as autocast has the weights in training
    return tuned.requires_grad_(False)
