"""Uses of bitsandbytes that its documentation does not cover. tests/test_library_internals.py tests each use.

pipeline/common/printing.py, which every stage imports, has another use: it matches the text of a warning.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations


def never_repack(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking NF4 weights.

    On a CPU with AVX512-BF16 the first evaluation repacks the weights for inference. Training after that has no
    gradients:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (Linear4bit.forward)
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def scales_to(model: torch.nn.Module, device: torch.device) -> None:
    """Move the scales of weights in NF4 to `device`. They are no parameters, so FSDP does not move them.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (Linear4bit)
    """
    for module in model.modules():
        if isinstance(state := getattr(module, "quant_state", None), bnb.functional.QuantState):
            state.to(device)


def dequantize_in_use(model: torch.nn.Module) -> None:
    """Make the modules of `model` dequantize their experts for each pass. pipeline.model.experts quantized them.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/parametrize.py
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            state = getattr(parameter, "quant_state", None)
            if state is not None and hasattr(module, "num_experts"):
                replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), parameter.device)


def keep_no_experts(model: torch.nn.Module) -> None:
    """Make a forward pass keep no dequantized experts for the backward pass, which dequantizes them again.

    Gradient checkpointing does this too. With these hooks, it would keep all else that the experts compute.
    """
    for module in model.modules():
        if is_parametrized(module):
            module.forward = keeping_no_weights(module)


def keeping_no_weights(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward function of `module`, which saves how to dequantize a weight in place of the weight."""
    forward, names = module.forward, list(module.parametrizations)

    def pack(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        for name in names:  # bitsandbytes keeps the dequantized weights until the forward pass ends
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
