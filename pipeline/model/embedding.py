"""Keeps the input embedding in RAM during training on a GPU: a batch looks up only a few of its rows."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel


class InRam(torch.nn.Module):
    """An embedding in RAM. `weight` (vocabulary x width) is not a parameter, so that nothing moves it to the GPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight.detach().cpu()
        self.found = self.weight.new_empty(0, self.weight.shape[1])  # kept, because pinning memory takes time

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of `ids` (batch x length) on the device of `ids`; shape: batch x length x width."""
        rows = ids.flatten().cpu()  # waits for the GPU, so that the last copy of `found` has ended
        if len(self.found) < len(rows):
            self.found = torch.empty(len(rows), self.weight.shape[1], dtype=self.weight.dtype, pin_memory=ids.is_cuda)
        found = torch.index_select(self.weight, 0, rows, out=self.found[: len(rows)])
        return found.to(ids.device, non_blocking=True, copy=True).view(*ids.shape, -1)


def only_looked_up(model: PeftModel | PreTrainedModel) -> bool:
    """Whether the embedding is a plain nn.Embedding, not tied to the head, and not trained (PEFT would wrap it)."""
    return type(model.get_input_embeddings()) is torch.nn.Embedding and not model.config.tie_word_embeddings


def keep_in_ram(model: PeftModel) -> None:
    """Move the embedding to RAM if it is `only_looked_up`. Same results; frees vocabulary x width x 2 bytes."""
    if only_looked_up(model):
        base = model.get_base_model()
        base.set_input_embeddings(InRam(base.get_input_embeddings().weight))
