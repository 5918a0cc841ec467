"""Whether training keeps only the inputs of layers, its gradient checkpoints, and whether these lie in RAM."""

from typing import Literal

import torch
from transformers import PreTrainedConfig

from pipeline.common.parameters.train import Train
from pipeline.model.free_memory import gpu_memory

CHECKPOINT_SHARE = 1 / 64  # of a GPU's memory: what checkpoints may take that are not offloaded


def pick_checkpointing(wanted: bool | Literal["auto"], device: torch.device) -> bool:
    return device.type == "cuda" if wanted == "auto" else wanted


def pick_offloading(
    train: Train, config: PreTrainedConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether the checkpoints of a batch with `tokens` tokens, padded, are kept in RAM beside a GPU.

    Copies take time, so "auto" keeps checkpoints on the GPU that take little of its memory.
    """
    if device.type != "cuda" or not pick_checkpointing(train.gradient_checkpointing, device):
        return False
    if train.activation_offloading == "auto":
        return checkpoint_bytes(config, tokens, dtype) > CHECKPOINT_SHARE * gpu_memory()
    return train.activation_offloading


def checkpoint_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the inputs of all layers for `tokens` tokens, which gradient checkpointing keeps."""
    text = config.get_text_config()
    return int(text.num_hidden_layers * tokens * text.hidden_size * dtype.itemsize)
