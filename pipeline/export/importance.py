"""How much each input of a model's linear layers weighs on its training rows: llama.cpp's importance matrix.

With it, quantization rounds with the least error where inputs are large: by the mean of their squares, as in
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

ROWS = 512  # of all, evenly


def some_rows(tokens: Path) -> list[list[int]]:
    """The token ids of up to ROWS rows of an Arrow file of data/tokens/."""
    rows = Dataset.from_file(str(tokens))
    return rows[:: -(-len(rows) // ROWS)]["input_ids"]


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """For each linear layer but the head, by its weight's name: each input's mean square over the tokens of `rows`
    (shape: inputs, float32).

    The head is left out as llama.cpp leaves it out: where it is tied, it is the embeddings too.
    """
    sums: dict[str, torch.Tensor] = {}

    def adding_to(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(end_dim=-2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    hooks = [
        layer.register_forward_pre_hook(adding_to(f"{name}.weight"))
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    ]
    for row in tqdm(rows, desc="importance", unit="row"):
        model(input_ids=torch.tensor([row], device=model.device))
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, rows))
    return {name: (total / tokens).cpu() for name, total in sums.items()}
