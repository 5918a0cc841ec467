"""Uses of torch that its documentation does not cover. tests/test_library_internals.py tests each use."""

import weakref
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors.

    `now` counts the tensors that are alive, and `peak` is the maximum of `now`. `small` is the sum over all tensors
    below `large` bytes that were ever made.

    torch documents memory counters for GPUs only. This base class receives each operation, also on the meta device:
    https://github.com/pytorch/pytorch/blob/main/torch/utils/_python_dispatch.py
    """

    def __init__(self, not_counted: list[torch.Tensor], large: int) -> None:
        super().__init__()
        self.now = self.peak = self.small = 0
        self.large = large
        self.known = {id(tensor.untyped_storage()) for tensor in not_counted}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.small += storage.nbytes() if storage.nbytes() < self.large else 0
            weakref.finalize(storage, self.freed, id(storage), storage.nbytes())

    def freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def fused_on_meta(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the memory of SDPA's fused kernels, on meta tensors.

    The kernels repeat the heads, convert the mask of padded rows to the type of the queries, and keep no scores. On
    meta tensors SDPA itself keeps the scores, and its documented function has no other kernel there:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/attention.cpp

    The shape of `query`, `key` and `value` is (batch, heads, length, width of a head). The values of DeepSeek's latent
    attention are narrower than its keys.
    """
    width = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = None if attention_mask is None else torch.zeros_like(attention_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, attn_mask=bias)[0][..., :width].transpose(1, 2).contiguous(), None


def unpadded_on_meta(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Compute attention with the memory of flash attention, which a GPU uses for rows without padding: it repeats no
    heads. Shapes are those of `fused_on_meta`."""
    width = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))
    fused = torch.ops.aten._scaled_dot_product_flash_attention
    return fused(query, key, value)[0][..., :width].transpose(1, 2).contiguous(), None


def copy_all(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy each tensor, with few kernels for all of them.

    torch's optimizers use this function, which is not documented:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/ForeachUnaryOp.cu
    """
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)
