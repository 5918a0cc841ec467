"""Uses of bitsandbytes that its documentation does not cover. tests/test_library_internals.py tests each use.

pipeline/common/printing.py, which every stage imports, has another use: it matches the text of a warning.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from bitsandbytes.optim import optimizer as optimizers
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations


def waiting_once(step: Callable[..., Any]) -> Callable[..., Any]:
    """Make a step of an optimizer wait for the GPU once, at its end.

    bitsandbytes waits after each tensor: 448 times for an adapter of 8 billion weights. The GPU does its work in order.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py (step)
    """

    @wraps(step)
    def stepped(optimizer: Any, closure: Any = None) -> Any:
        wait, optimizers.sync_gpu = optimizers.sync_gpu, lambda _: None
        try:
            result = step(optimizer, closure)
        finally:
            optimizers.sync_gpu = wait
        wait(optimizer.param_groups[0]["params"][0])
        return result

    return stepped


optimizers.Optimizer8bit.step = waiting_once(optimizers.Optimizer8bit.step)


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


def scales_of(layer: torch.nn.Linear) -> torch.Tensor | None:
    """Return the scales of a layer's weights in 32 bits, or None for a layer that is not in NF4."""
    state = getattr(layer, "quant_state", None)
    if state is None or not state.nested:
        return state and state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset)


def dequantized(layer: torch.nn.Linear, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of a layer as `dtype`; shape (outputs, inputs). `scales` are those of `scales_of`.

    bitsandbytes computes the scales anew in each pass:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (dequantize_4bit)
    """
    if scales is None:
        return layer.weight.to(dtype)
    state = layer.quant_state
    plain = bnb.functional.QuantState(
        absmax=scales,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
    )
    return bnb.functional.dequantize_4bit(layer.weight.view(-1, 1), plain)


class Product(torch.autograd.Function):
    """A product with a matrix in NF4 on the meta device: each pass makes the complete matrix, and keeps no copy of it.

    bitsandbytes has no kernel for this device. Its own function needs the same memory:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/autograd/_functions.py (MatMul4Bit)
    """

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        context.weight = weight
        return torch.nn.functional.linear(inputs, torch.empty_like(weight, dtype=inputs.dtype))

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return torch.matmul(gradient, torch.empty_like(context.weight, dtype=gradient.dtype)), None


def on_meta(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    result = Product.apply(inputs, layer.weight)
    return result if layer.bias is None else result + layer.bias


def quantize_on_meta(model: Any, layers: list[torch.nn.Linear], dora: bool) -> None:
    """Replace `layers` of a model on the meta device by layers in NF4, for which PEFT has an adapter of its own.

    With DoRA the layers keep their class, because that adapter reads the numbers of the weights.
    """
    names = {module: name for name, module in model.named_modules()}
    # bitsandbytes keeps this map on the device that asks first, which must not be meta.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    for layer in layers:
        new = layer
        if not dora:
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta")
            _, new.quant_state = bnb.functional.quantize_4bit(layer.weight, quant_type="nf4", compress_statistics=True)
            new.bias = layer.bias
            model.set_submodule(names[layer], new)
        new.forward = MethodType(on_meta, new)
    model.is_loaded_in_4bit = True
