"""Experts in NF4.

Transformers has all experts of a block in parameters of three dimensions (experts, rows, columns). Its quantizer leaves
them in 16 bits: bitsandbytes quantizes layers, and has `bitsandbytes.nn.parametrize` for other parameters.

The 16-bit scales are not quantized again. So 64 weights of a row are rounded alone, and `merge` rounds the tensors of
the base's files to the same values, whether a file has one expert or all of them in a tensor.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

BLOCK = 64  # weights with one scale


def is_experts(module: torch.nn.Module, name: str) -> bool:
    """Whether the parameter `name` of `module` has experts that can be in NF4."""
    weight = getattr(module, name)
    return hasattr(module, "num_experts") and weight.ndim == 3 and weight.shape[-1] % BLOCK == 0


def names_of_experts(model: torch.nn.Module) -> set[str]:
    """The names of the parameters that are in NF4 beside the linear layers."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if is_experts(module, name)
    }


def quantized_experts(weight: torch.Tensor, quant_storage: torch.dtype) -> torch.nn.Parameter:
    """`weight` in NF4, with its scales as the attribute `quant_state`."""
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", quant_storage=quant_storage)
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    return parameter


def dequantize_in_use(model: torch.nn.Module) -> None:
    """Make the modules of `model` dequantize their quantized experts for each pass, and keep no dequantized weights.

    Without the second, a forward pass would keep the dequantized experts of all blocks for the backward pass.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            state = getattr(parameter, "quant_state", None)
            if state is not None and hasattr(module, "num_experts"):
                replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), parameter.device)
        if is_parametrized(module):
            module.forward = keeping_no_weights(module)


def keeping_no_weights(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward function of `module`, which saves how to dequantize a weight in place of the weight."""
    forward, names = module.forward, list(module.parametrizations)

    def pack(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        for name in names:  # bitsandbytes keeps the dequantized weights during a forward pass
            if saved.untyped_storage().data_ptr() == getattr(module, name).untyped_storage().data_ptr():
                view = saved.size(), saved.stride(), saved.storage_offset()
                return lambda: getattr(module, name).as_strided(*view)
        return saved

    def unpack(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()

    @wraps(forward)
    def with_hooks(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return with_hooks


def keep_dequantized(model: torch.nn.Module) -> None:
    """Undo `dequantize_in_use`: the values are those of NF4, and no pass dequantizes them again."""
    for module in model.modules():
        if is_parametrized(module):
            for name in list(module.parametrizations):
                weight = getattr(module, name)
                remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
            del module.forward
