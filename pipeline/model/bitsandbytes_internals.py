"""What this project uses of bitsandbytes beyond its documentation. tests/test_library_internals.py tests each use.

pipeline/common/printing.py, which every stage imports, has one more: a warning of bitsandbytes by its words.
"""

import bitsandbytes as bnb
import torch


def never_repack(model: torch.nn.Module) -> None:
    """Keep NF4 weights as they are. On a CPU with AVX512-BF16 the first evaluation repacks the weights for inference,
    and training from then on has no gradients:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (Linear4bit.forward)
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
