"""Kernels of Liger for norms, gated MLPs and positions, in place of several operations of torch each.

Liger documents how to patch classes before a model is made. Transformers too patches a model that is there, in this
way: https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/liger.py
tests/test_liger.py compares the results.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.pinned import installed_version

TANH = "gelu_pytorch_tanh"
# The activation of Liger's MLP for each family. Liger does not read that of a model.
FAMILIES = {
    "exaone4": "silu",
    "gemma": TANH,
    "gemma2": TANH,
    "gemma3_text": TANH,
    "granite": "silu",
    "hunyuan_v1_dense": "silu",
    "llama": "silu",
    "ministral": "silu",
    "mistral": "silu",
    "olmo2": "silu",
    "olmo3": "silu",
    "phi3": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "smollm3": "silu",
}
# The loss is not Liger's: TRL's head never has the logits of all tokens in memory either.
KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def uses_liger(wanted: str, config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether a training on `device` uses Liger's kernels. `wanted` is train.kernels.

    Raises:
        UserError: `wanted` is liger, and Liger has no kernels for the device or the model, or is not installed.
    """
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    has_kernels = activation is not None and FAMILIES.get(config.model_type) == activation
    if wanted != "liger":
        return wanted == "auto" and device.type == "cuda" and has_kernels and installed()
    if device.type != "cuda":
        raise UserError("train.kernels is liger, whose kernels need a GPU: set it to auto")
    if not has_kernels:
        with_activation = f" with the activation {activation}" if config.model_type in FAMILIES else ""
        raise UserError(
            f"train.kernels is liger, which has no tested kernels for a {config.model_type} model{with_activation}: "
            "set it to auto"
        )
    if not installed():
        raise UserError(
            "train.kernels is liger: .venv/bin/pip install --no-deps -r requirements-liger.txt, or set it to auto"
        )
    return True


def installed() -> bool:
    return installed_version("liger-kernel") is not None


def use_liger(model: PreTrainedModel) -> None:
    """Replace norms, MLPs and the rotation of positions in `model`, and the latter in all models of its family."""
    logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)  # it warns of each kind that is not installed
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    module = sys.modules[type(model).__module__]
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    _apply_liger_kernel_to_instance(model, **KERNELS, **NO_LOSS)
    vars(module).update(classes)  # which Liger replaces for models that are made later


@contextmanager
def liger_on_meta(model: PreTrainedModel) -> Iterator[None]:
    """In the block, `model`, which is on the meta device, needs memory as with Liger. No kernel computes."""
    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    use_liger(model)
    found = list(kernels())
    for of, name, _ in found:
        setattr(of, name, NoKernel())
    try:
        yield
    finally:
        for of, name, kernel in found:
            setattr(of, name, kernel)
        module.update(before)


class NoKernel:
    """Is launched as a kernel of Triton, kernel[grid](...), and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def kernels() -> Iterator[tuple[ModuleType, str, Any]]:
    """The kernels of Triton that `use_liger` uses, and their modules and names."""
    of_triton = import_module("triton").JITFunction
    for name in ("geglu", "rms_norm", "rope", "swiglu"):
        module = import_module(f"liger_kernel.ops.{name}")
        for attribute, value in list(vars(module).items()):
            if isinstance(value, of_triton):
                yield module, attribute, value
