"""Uses of bitsandbytes that its documentation does not cover. tests/test_library_internals.py tests each use.

pipeline/common/printing.py, which every stage imports, has another use: it matches the text of a warning.
"""

import bitsandbytes as bnb
import torch


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
