"""Finds control tokens of the chat template whose embeddings the base never trained.

A base that was not trained on conversations may have such tokens with untrained embeddings: the answer is noise, and
<|im_end|> never comes. An embedding counts as untrained if it is

- close to zero, to the mean of all embeddings (where Transformers puts added tokens), or to another added token: closer
  than a tenth of an ordinary token's distance from the mean. Land and Bartolo find under-trained tokens in a similar
  way (https://arxiv.org/abs/2405.05417);
- or a sample of N(0, initializer_range): its length, and its angle to the mean, are as expected by chance.

Errors: little-trained rows, and new rows of another distribution than in config.json, count as trained. A trained row
of exactly that length and at a right angle to the mean counts as untrained. A list in `lora.trainable_tokens` replaces
this detection.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from pipeline.common.errors import UserError
from pipeline.model.chat_template import token_ids

NEAR = 0.1  # of an ordinary token's distance from the mean
CHANCE = 4.0  # standard deviations
BLOCKS, BLOCK = 64, 32  # the sample: number of blocks, rows per block; the matrix may have a gigabyte


def trainable_tokens(wanted: Literal["auto"] | list[str], folder: Path, tokenizer: Any) -> list[int]:
    """The ids of the tokens in `wanted`; with "auto", of the untrained control tokens.

    Raises:
        UserError: a text in `wanted` is not a single token.
    """
    texts = untrained(folder, tokenizer) if wanted == "auto" else wanted
    if wanted == "auto" and texts:
        print(f"lora.trainable_tokens: also training {', '.join(texts)}: their embeddings in the base are untrained")
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    for text, of_text in ids.items():
        if len(of_text) != 1:
            raise UserError(
                f"lora.trainable_tokens: {text!r} is {len(of_text)} tokens of this base, not one: correct it"
            )
    return sorted({of_text[0] for of_text in ids.values()})


def untrained(folder: Path, tokenizer: Any) -> list[str]:
    """The control tokens of the chat template whose embeddings in `folder` look untrained.

    In a separate head, only tokens that end an answer count: the model never writes the others.

    Raises:
        UserError: the base has no embed_tokens, or fewer embeddings than its tokenizer has tokens.
    """
    read, written = template_tokens(tokenizer)
    added = sorted(tokenizer.get_added_vocab().values())
    deviation = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "initializer_range", 0.02)
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                if name.endswith("embed_tokens.weight"):
                    found["embed_tokens"] = untouched(tensors.get_slice(name), read, added, deviation)
                elif name.endswith("lm_head.weight"):
                    found["lm_head"] = untouched(tensors.get_slice(name), written, added, deviation)
    if "embed_tokens" not in found:
        raise UserError(f"base.model {folder} has no embed_tokens: set lora.trainable_tokens to a list, such as []")
    return tokenizer.convert_ids_to_tokens(sorted({token for tokens in found.values() for token in tokens}))


def opened(file: Path) -> Any:
    """Raises UserError if the file is damaged."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"base.model: {file} is damaged ({error}): fetch it again") from None


def template_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the added tokens in a short conversation; and those of them that end its answer."""
    turns = [{"role": role, "content": "Yes."} for role in ("system", "user", "assistant")]
    try:
        ids = token_ids(tokenizer, turns)
    except TemplateError:  # the template refuses a system message
        turns = turns[1:]
        ids = token_ids(tokenizer, turns)
    prompt = token_ids(tokenizer, turns[:-1], add_generation_prompt=True)
    added = set(tokenizer.get_added_vocab().values())
    return sorted(added & set(ids)), sorted(added & set(ids[len(prompt) :]))


def untouched(matrix: Any, ids: list[int], added: list[int], deviation: float) -> list[int]:
    """The `ids` whose rows in `matrix` (a slice of a file, shape tokens x hidden) look untrained.

    `added` are the ids of all added tokens. `deviation` is the standard deviation of new rows.
    """
    tokens, hidden = matrix.get_shape()
    if not ids:
        return []
    if ids[-1] >= tokens:
        raise UserError(
            f"base.model has {tokens} embeddings, but its chat template writes token {ids[-1]}: choose another base"
        )
    step = max(BLOCK, tokens // BLOCKS)
    sample = torch.cat([matrix[start : start + BLOCK] for start in range(0, tokens, step)]).float()
    mean = sample.mean(0, keepdim=True)
    ordinary = (sample - mean).norm(dim=1).median()

    others = [token for token in added if token < tokens]
    rows, other_rows = (torch.cat([matrix[t : t + 1] for t in of]).float() for of in (ids, others))
    distances = torch.cdist(rows, torch.cat([other_rows, mean, torch.zeros(1, hidden)]))
    distances[:, : len(others)][torch.tensor(ids)[:, None] == torch.tensor(others)] = torch.inf  # to itself
    close = distances.min(1).values < NEAR * ordinary

    length, angle = rows.norm(dim=1) / (deviation * math.sqrt(hidden)), torch.cosine_similarity(rows, mean)
    by_chance = ((length - 1).abs() < CHANCE / math.sqrt(2 * hidden)) & (angle.abs() < CHANCE / math.sqrt(hidden))
    return [token for token, new in zip(ids, close | by_chance, strict=True) if new]
