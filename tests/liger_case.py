"""Compare a small model of each family with and without Liger's kernels, on a CPU, and print the differences as JSON.

python -m tests.liger_case, with TRITON_INTERPRET=1 and the folder of requirements-liger.txt and Triton in PYTHONPATH
"""

import copy
import json
import sys
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.training.liger_internals import FAMILIES, use_liger

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
INPUT = torch.arange(10).reshape(2, 5)


@triton.jit
def rsqrt(numbers):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(numbers)


@triton.jit
def tanh(numbers):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * numbers) - 1.0


def interpret() -> None:
    """Give Triton's interpreter what it lacks: functions of CUDA's libdevice, and numbers with a type."""
    liger_kernel.ops.rms_norm.rsqrt, liger_kernel.ops.geglu.tanh = rsqrt, tanh
    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = converted


def compared(family: str) -> dict[str, Any]:
    """Return the largest difference of logits and gradients, as a share of the largest number; what is Liger's; and
    whether the classes of the family are still Transformers'."""
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **SPECIAL))
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    with_liger = copy.deepcopy(plain)
    expected = results(plain)
    module = sys.modules[type(plain).__module__]
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    use_liger(with_liger)
    pairs = zip(results(with_liger), expected, strict=True)
    names = {module._get_name() for module in with_liger.modules()}
    return {
        "difference": max(float((found - other).abs().max() / other.abs().max()) for found, other in pairs),
        "rotation": module.apply_rotary_pos_emb.__module__,
        "classes": classes == [value for value in vars(module).values() if isinstance(value, type)],
        "modules": sorted(name for name in names if name.startswith("Liger")),
    }


def results(model: Any) -> list[torch.Tensor]:
    outputs = model(input_ids=INPUT, labels=INPUT)
    outputs.loss.backward()
    return [outputs.logits.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


if __name__ == "__main__":
    interpret()
    print(json.dumps({family: compared(family) for family in FAMILIES}))
