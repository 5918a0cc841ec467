"""A use of TRL in the benchmarks that its documentation does not cover.

tests/test_library_internals.py tests the use.
"""

from typing import Any

import torch


def log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token of `ids` after the first; shape: rows, length - 1.

    `model` is that of an SFTTrainer. On a GPU, TRL computes its head with Triton, and documents no other way to it:
    https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py (add_fused_lm_head)
    """
    return model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
