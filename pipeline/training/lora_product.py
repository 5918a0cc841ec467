"""The product of a layer with LoRA, in fewer operations than PEFT's, with the same result but for rounding.

PEFT casts the adapter for each product, copies the result of the base, and scales and adds in operations of their own.
On a GPU most of these operations take less time than their launch. Here the adapter is cast once a step, and a matrix
product scales, adds, or returns another type by itself.

PEFT documents no way to compute a layer differently. tests/test_lora_product.py compares the results:
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/bnb.py (Linear4bit.forward)
"""

from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable

from pipeline.model.bitsandbytes_internals import dequantized, scales_of
from pipeline.training.torch_internals import copy_all

ADAPTER = "default"


class Layer:
    """A layer of the base with LoRA's matrices A, shape (rank, inputs), and B, shape (outputs, rank)."""

    def __init__(self, module: LoraLayer, dtype: torch.dtype) -> None:
        self.base, self.scaling = module.get_base_layer(), module.scaling[ADAPTER]
        self.trained = [module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight]
        with torch.no_grad():
            self.a, self.b = (weight.to(dtype) for weight in self.trained)  # copies, unless the type is the same


class LoraProduct(torch.autograd.Function):
    """y = x W' + scaling (x A') B', and its gradients for x, A and B: https://arxiv.org/abs/2106.09685"""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Return the product; shapes (..., inputs) and (..., outputs)."""
        scales = scales_of(layer.base)
        weight = dequantized(layer.base, scales, inputs.dtype)
        result = torch.nn.functional.linear(inputs, weight, layer.base.bias)
        reduced = inputs.flatten(0, -2) @ layer.a.T
        result.view(-1, result.shape[-1]).addmm_(reduced, layer.b.T, alpha=layer.scaling)
        context.save_for_backward(inputs, reduced, scales)
        context.layer = layer
        return result

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        layer: Layer = context.layer
        inputs, reduced, scales = context.saved_tensors
        rows = gradient.flatten(0, -2)
        of_reduced = rows @ layer.b
        of_a = scaled_product(of_reduced.T, inputs.flatten(0, -2), layer.scaling, like=layer.trained[0])
        of_b = scaled_product(rows.T, reduced, layer.scaling, like=layer.trained[1])
        of_inputs = None
        if context.needs_input_grad[0]:
            of_inputs = rows @ dequantized(layer.base, scales, rows.dtype)
            of_inputs.addmm_(of_reduced, layer.a, alpha=layer.scaling)
            of_inputs = of_inputs.view_as(inputs)
        return of_inputs, of_a, of_b, None


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float, like: torch.Tensor) -> torch.Tensor:
    """Return scaling * (left @ right) with the shape and the type of `like`."""
    if like.dtype == left.dtype:
        return torch.addmm(like, left, right, beta=0, alpha=scaling)
    if left.device.type == "cuda" and like.dtype == torch.float32:  # which a CPU does not offer
        return torch.addmm(like, left, right, beta=0, alpha=scaling, out_dtype=like.dtype)
    return (left @ right * scaling).to(like.dtype)


def use_lora_product(model: PeftModel, dtype: torch.dtype) -> int:
    """Make all layers of `model` that have plain LoRA compute as above, in `dtype`. Others compute as in PEFT.

    A call of `model` renews the copies of trained weights that are not in `dtype`. A call of a part of it does not.
    Returns the number of these trained weights, copied or not.
    """
    layers = [use_in(module, Layer(module, dtype)) for module in model.modules() if has_plain_lora(module)]
    copies = [copy for layer in layers for copy in (layer.a, layer.b)]
    trained = [weight for layer in layers for weight in layer.trained]

    def renew_copies(*_: Any) -> None:
        copy_all(trained, copies)

    if trained and trained[0].dtype != dtype:
        model.register_forward_pre_hook(renew_copies)
    return sum(map(torch.numel, trained))


def has_plain_lora(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), torch.nn.Linear)
        and ADAPTER in module.lora_A
        and ADAPTER not in module.lora_variant
        and isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
    )


def use_in(module: LoraLayer, layer: Layer) -> Layer:
    forward, dtype = module.forward, layer.a.dtype
    in_nf4 = hasattr(layer.base, "quant_state")

    @wraps(forward)
    def product(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if module.disable_adapters or module.merged or args or kwargs:
            return forward(inputs, *args, **kwargs)
        result = LoraProduct.apply(inputs.to(dtype), *layer.trained, layer)
        return result.to(inputs.dtype) if in_nf4 else result  # as bitsandbytes, and as torch under autocast

    module.forward = product
    return layer
