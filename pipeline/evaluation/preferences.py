"""How likely a model finds the two answers of each held-out pair."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.outputs import existing
from pipeline.common.rows import read_jsonl, text_of
from pipeline.evaluation.answers import batches_by_length, forward, padded
from pipeline.evaluation.preference_exam import Preference
from pipeline.model.chat_template import end_tokens
from pipeline.model.supervision import IGNORED, supervised


def score_preferences(
    model: PreTrainedModel, tokenizer: Any, preferences: list[Preference], batch_size: int
) -> list[dict[str, Any]]:
    """One line for each pair, with its scores: `chosen` and `rejected`, the mean log-likelihood of the answer's tokens
    in nats per token; `margin`, their difference; `preferred`, 1.0 if chosen is likelier, else 0.0.

    Raises:
        UserError: the chat template cannot write an answer, or the probabilities are no numbers.
    """
    model.eval()
    ends = end_tokens(model.generation_config)
    rows = []
    for pair in preferences:
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            where = f"{pair.source}: {name}"
            ids, labels = supervised(
                tokenizer, [*pair.messages, answer], ends, where, mask_history=True, tools=pair.tools
            )
            scored = [at for at, label in enumerate(labels) if label != IGNORED]
            rows.append((ids[: scored[0]], ids[scored[0] : scored[-1] + 1]))
    likelihoods = log_likelihoods(model, rows, batch_size)
    lines = []
    for pair, chosen, rejected in zip(preferences, likelihoods[::2], likelihoods[1::2], strict=True):
        if math.isnan(chosen + rejected):
            raise UserError(f"{pair.source}: the model's probabilities are no numbers (NaN)")
        scores = {
            "preferred": float(chosen > rejected),
            "margin": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
        }
        lines.append(described(pair) | {"tags": pair.tags, "source": pair.source, "scores": scores})
    return lines


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], batch_size: int) -> list[float]:
    """For each (prompt, answer), as token ids: the mean log-likelihood of the answer's tokens in nats."""
    found: dict[int, float] = {}
    lengths = [[len(prompt) + len(answer), len(answer)] for prompt, answer in rows]
    for batch in batches_by_length(lengths, batch_size, "preferences"):
        ids = padded([rows[i][0] + rows[i][1][:-1] for i in batch], "left").to(model.device)
        longest = max(len(rows[i][1]) for i in batch)
        logits = forward(model, ids, (ids != IGNORED).long(), logits_to_keep=longest).logits
        for i, of_row in zip(batch, logits, strict=True):
            answer = torch.tensor(rows[i][1], device=logits.device)
            found[i] = -cross_entropy(of_row[-len(answer) :].float(), answer).item()
    return [found[i] for i in range(len(rows))]


def described(pair: Preference) -> dict[str, str]:
    return {"id": pair.id, "prompt": pair.prompt, "chosen": text_of(pair.chosen), "rejected": text_of(pair.rejected)}


def read_scored(path: Path, preferences: list[Preference]) -> list[dict[str, Any]]:
    """The lines of a file of scored pairs, in the exam's order. Raises UserError if the file has other pairs."""
    lines = read_jsonl(existing(path))
    if [{key: line[key] for key in ("id", "prompt", "chosen", "rejected")} for line in lines] != list(
        map(described, preferences)
    ):
        raise UserError(f"{path} has the scores of another preference exam: run dvc repro")
    return lines
