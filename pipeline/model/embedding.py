"""The input embedding, kept in RAM while a GPU trains: a batch needs few of its rows, and only looks them up."""

import torch
from peft import PeftModel
from torch.nn.functional import embedding
from transformers import PreTrainedModel


class InRam(torch.nn.Module):
    """Looks the rows of `weight` (words x width) up in RAM. It is no parameter, so that nothing moves it to the GPU."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight.detach().cpu()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of `ids` on their device; shapes: batch x length, batch x length x width."""
        return embedding(ids.cpu(), self.weight).to(ids.device)


def only_looked_up(model: PeftModel | PreTrainedModel) -> bool:
    """Whether the embedding is neither the head too, nor trained (PEFT wraps it then), nor of a kind of its own."""
    return type(model.get_input_embeddings()) is torch.nn.Embedding and not model.config.tie_word_embeddings


def keep_in_ram(model: PeftModel) -> None:
    """Take the embedding off the device if it is `only_looked_up`: the same numbers, words x width x 2 bytes less."""
    if only_looked_up(model):
        base = model.get_base_model()
        base.set_input_embeddings(InRam(base.get_input_embeddings().weight))
