"""A GPU that does not exist: torch's operations on it have devices, types and shapes, but no bytes.

Import this module before torch. Each operation is counted: the memory that torch would allocate, the kernels that the
processor would launch, the waits of the processor for the GPU, and the bytes that cross the bus.

torch documents fake tensors for compilers: https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html.
tests/test_fake_gpu.py tests the use.
"""

import bench.cuda_guard  # noqa: F401

# isort: split
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional
import peft.tuners.lora.dora
import torch
import transformers.utils.import_utils
import trl.kernels.chunked_logprob
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.caching_allocator import BLOCK, EMPTIED, FREED, Event, rounded
from pipeline.training.liger_internals import installed, kernels

aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
DEVICE = torch.device("cuda", 0)
MEMORY = 24 * 2**30
TENSORS_OF_LAUNCH = 110  # of a foreach operation: https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/MultiTensorApply.cuh
NOT_LAUNCHED = {  # besides views
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten._local_scalar_dense.default,
    aten.is_pinned.default,
    torch.ops.prim.device.default,
}


class FakeGpu(TorchDispatchMode):
    """Counts what happens on the GPU.

    `padded` says whether batches have padding: a fake mask cannot say so itself.
    """

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.events: list[Event] = []
        self.allocated = self.peak = 0  # bytes
        self.launched: Counter[str] = Counter()  # kernels, by operation
        self.waits: Counter[str] = Counter()  # of the processor for the GPU, by reason
        self.moved: Counter[str] = Counter()  # bytes, by direction
        self.numbers: dict[int, int] = {}  # of the storages that are alive
        self.of_mask: Any = None

    def begin_step(self) -> None:
        self.peak = self.allocated
        self.launched.clear()
        self.waits.clear()
        self.moved.clear()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = INSTEAD[operation](self, *args, **kwargs) if operation in INSTEAD else operation(*args, **kwargs)
        results = tensors(result)
        if any(tensor.device == DEVICE for tensor in [*results, *tensors((args, kwargs))]):
            self.count(operation, args)
        if operation in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if operation is aten._to_copy.default else args[1]
            without_wait = kwargs.get("non_blocking") or args[2:3] == (True,)
            self.move(source, results[0], wait=not without_wait)
        for tensor in results:
            self.hold(tensor)
        return result

    def count(self, operation: Any, args: Any) -> None:
        name = str(operation)
        if operation.is_view or operation in NOT_LAUNCHED or operation is bnb.gemm_4bit.default:
            return
        self.launched[name] += -(-len(args[0]) // TENSORS_OF_LAUNCH) if name.startswith("aten._foreach") else 1

    def move(self, source: torch.Tensor, target: torch.Tensor, wait: bool) -> None:
        if source.device != target.device:
            direction = f"{source.device.type} to {target.device.type}"
            self.moved[direction] += target.nbytes
            self.waits[f"copy {direction}"] += wait

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device != DEVICE or key in self.numbers:
            return
        size = rounded(storage.nbytes(), BLOCK)
        made = self.numbers[key] = len(self.events)
        self.events.append((made, size))
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.free, key, made, size)

    def free(self, key: int, made: int, size: int) -> None:
        if self.numbers.get(key) == made:
            del self.numbers[key]
        self.events.append((made, FREED))
        self.allocated -= size


def tensors(of: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)]


def number(gpu: FakeGpu, tensor: torch.Tensor) -> bool | float:
    """Stands for the number in a tensor: 1, or true."""
    gpu.waits["number"] += tensor.device == DEVICE
    if tensor is gpu.of_mask:
        return not gpu.padded
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def all_true(gpu: FakeGpu, mask: torch.Tensor) -> torch.Tensor:
    gpu.of_mask = aten.all.default(mask)
    return gpu.of_mask


def indexed(gpu: FakeGpu, tensor: torch.Tensor, indices: Any) -> torch.Tensor:
    """With a mask: as if the mask were true throughout, which takes most memory."""
    mask = indices[0]
    if mask is None or mask.dtype != torch.bool:
        return aten.index.Tensor(tensor, indices)
    gpu.waits["mask"] += mask.device == DEVICE
    return tensor.new_empty((mask.numel(), *tensor.shape[mask.ndim :]))


def put(gpu: FakeGpu, tensor: torch.Tensor, indices: Any, *_: Any) -> torch.Tensor:
    gpu.waits["mask"] += any(index is not None and index.dtype == torch.bool for index in indices)
    return tensor


def product_4bit(
    gpu: FakeGpu,
    left: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    *_: Any,
) -> torch.Tensor:
    """As bitsandbytes multiplies many rows: it dequantizes the complete matrix first (backends/cuda/ops.py)."""
    if absmax_8bit is not None:
        gpu.launched["bitsandbytes.dequantize_blockwise.default"] += 1
        gpu.launched["aten.add.Tensor"] += 1
        gpu.hold(scales := torch.empty_like(absmax_8bit, dtype=torch.float32))
        gpu.hold(sums := torch.empty_like(scales))
        del scales, sums
    gpu.launched["bitsandbytes.dequantize_4bit.default"] += 1
    gpu.hold(weight := torch.empty(shape, dtype=left.dtype, device=left.device))
    gpu.launched["aten.mm.default"] += 1
    gpu.hold(result := left.new_empty(*left.shape[:-1], weight.shape[0]))
    return result


INSTEAD: dict[Any, Callable[..., Any]] = {  # of operations whose result depends on numbers, or that torch decomposes
    aten._local_scalar_dense.default: number,
    aten.all.default: all_true,
    aten.index.Tensor: indexed,
    aten._index_put_impl_.default: put,
    aten.silu_backward.default: lambda _, gradient, __: torch.empty_like(gradient),
    aten.is_pinned.default: lambda *_: False,
    aten._pin_memory.default: lambda _, tensor, *__: tensor.clone(),
    bnb.gemm_4bit.default: product_4bit,
}
# Without a kernel of its own, torch would decompose this operation before anybody can count it.
library = torch.library.Library("aten", "IMPL")
library.impl("silu_backward", lambda gradient, _: torch.empty_like(gradient), "CUDA")


class Fake(FakeTensorMode):
    avoid_device_init = True  # although torch.cuda.is_available() is true here


class Idle:
    """A stream or an event: nothing waits."""

    cuda_stream, device = 0, DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "Idle"]:
        return lambda *_, **__: self


class Kernel:
    """Stands for a kernel of Triton."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: self.gpu.launched.update([self.name])


@contextmanager
def fake_gpu(padded: bool = False) -> Iterator[FakeGpu]:
    """Inside the block this process has one GPU of the Ada generation with 24 GiB, and all new tensors are fake."""
    gpu = FakeGpu(padded)

    def wait(*_: Any) -> None:
        gpu.waits["synchronize"] += 1

    def empty() -> None:
        gpu.events.append((0, EMPTIED))

    def paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        pages = torch.zeros(shape, dtype=dtype)  # in memory that CUDA moves as needed: torch does not allocate it
        pages.is_paged = True
        return pages

    heads = trl.kernels.chunked_logprob
    changes: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, cuda() | {"synchronize": wait, "empty_cache": empty}),
        (torch.version, {"cuda": "13.0"}),
        (torch.nn.Module, {"_apply": applied}),
        # Fake tensors cannot be made from numbers in inference mode.
        (torch.inference_mode, {"__enter__": torch.no_grad.__enter__, "__exit__": torch.no_grad.__exit__}),
        (torch.nn.functional, {"scaled_dot_product_attention": attention}),
        (_foreach_utils, {"_foreach_supported_types": [torch.Tensor, FakeTensor]}),
        (transformers.utils.import_utils, {"is_fake_tensor": lambda _: False}),  # keeps masks that mask nothing
        (heads, {"_TRITON_AVAILABLE": True, "triton": SimpleNamespace(cdiv=lambda size, of: -(-size // of))}),
        (heads, {name: Kernel(gpu, name) for name in ("_forward_kernel", "_backward_kernel")}),
        *((module, {name: Kernel(gpu, name)}) for module, name, _ in (kernels() if installed() else ())),
        (peft.tuners.lora.dora, {"dequantize_module_weight": dequantized}),
        (bitsandbytes.functional, {"get_paged": paged, "fill": nothing, "prefetch_tensor": nothing}),
    ]
    with ExitStack() as stack:
        for of, attributes in changes:
            for name, value in attributes.items():
                stack.enter_context(patch.object(of, name, value, create=True))
        stack.enter_context(Fake(allow_non_fake_inputs=True))
        stack.enter_context(gpu)
        yield gpu


def dequantized(layer: torch.nn.Linear) -> torch.Tensor:
    """PEFT's dequantize_module_weight, which knows weights in NF4 by their class. Fake ones have another class."""
    state = getattr(layer.weight, "quant_state", None)
    return bitsandbytes.functional.dequantize_4bit(layer.weight, state) if state else layer.weight


def nothing(*_: Any, **__: Any) -> None:
    pass


def cuda() -> dict[str, Any]:
    """What the functions of torch.cuda do on this GPU."""
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 9),
        "get_device_name": "a GPU that does not exist",
        "get_arch_list": ["sm_75"],
        "get_device_properties": SimpleNamespace(total_memory=MEMORY, major=8, minor=9, multi_processor_count=128),
        "mem_get_info": (MEMORY, MEMORY),
        "max_memory_allocated": 0,
        "get_rng_state_all": [],
        "current_stream": Idle(),
        "default_stream": Idle(),
        "stream": nullcontext(),
    }
    silent = ["_lazy_init", "set_device", "manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"]
    return (
        {name: lambda *_, answer=answer, **__: answer for name, answer in answers.items()}
        | {name: nothing for name in [*silent, "reset_peak_memory_stats"]}
        | {"Stream": Idle, "Event": Idle, "get_rng_state": lambda *_: torch.zeros(1)}
    )


def applied(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], *_: Any) -> torch.nn.Module:
    """torch.nn.Module._apply, which cannot exchange fake tensors."""
    with torch.no_grad():
        for each in module.modules():
            for name, weight in each._parameters.items():
                if weight is not None and (changed := change(weight)) is not weight:
                    each._parameters[name] = torch.nn.Parameter(changed, requires_grad=weight.requires_grad)
            for name, buffer in each._buffers.items():
                each._buffers[name] = None if buffer is None else change(buffer)
    return module


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernels that torch chooses on a GPU: flash attention without a mask, memory-efficient attention with one."""
    if attn_mask is None and query.shape[-1] <= 256 and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
