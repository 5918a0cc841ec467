"""Measures llama.cpp's importance matrix on training rows: the mean square of each input of the linear layers.

With the matrix, quantization has smaller errors for weights with large inputs:
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

ROWS = 512  # maximum rows, evenly spaced


def some_rows(tokens: Path) -> list[list[int]]:
    """The token ids of up to ROWS rows of an Arrow file of data/tokens/."""
    rows = Dataset.from_file(str(tokens))
    return rows[:: -(-len(rows) // ROWS)]["input_ids"]


@torch.inference_mode()
def mean_squares(model: PreTrainedModel, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """{weight name: mean square of each input over all tokens of `rows`} (shape: inputs, float32) of the linear layers.

    The head is not measured, as in llama.cpp: a tied head is also the embedding.
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
