"""Experts in NF4.

Transformers has all experts of a block in parameters of three dimensions (experts, rows, columns). Its quantizer leaves
them in 16 bits, because bitsandbytes has no layer for them.

The scales, of 32 bits, are not quantized again. So 64 weights of a row are rounded alone, and `merge` rounds the
tensors of the base's files to the same values, whether a file has one expert or all of them in a tensor.
"""

import torch
from bitsandbytes.functional import quantize_4bit

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
