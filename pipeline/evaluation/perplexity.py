"""The perplexity of a model on raw text (https://huggingface.co/docs/transformers/perplexity)."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.rows import read_jsonl
from pipeline.model.packing import packed

WINDOW = 512  # tokens that are read at a time; fewer if the base cannot read so many


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: Any, held_out: Path) -> dict[str, float]:
    """The perplexity on the documents of data/corpus_valid.jsonl, and their number of tokens; {} without documents.

    The documents are packed as in training. The perplexity is the exponential of the mean negative log-likelihood of
    a token in nats. The first token of a window has no likelihood and does not count.
    """
    model.eval()
    window = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW))
    nll, tokens = 0.0, 0
    for row in tqdm(packed(read_jsonl(held_out), tokenizer, window), desc="perplexity", unit="window"):
        ids = torch.tensor(row, dtype=torch.long, device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll += cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        tokens += len(row) - 1
    if not math.isfinite(nll):
        raise UserError(f"{held_out}: the model's probabilities are no numbers (NaN)")
    return {"perplexity": math.exp(nll / tokens), "tokens": tokens} if tokens else {}
