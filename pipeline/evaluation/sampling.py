"""Answers that a model draws at random, several to each prompt."""

from random import Random

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.answers import decode, read_prompts


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    names: list[str],
    prompts: list[list[int]],
    ends: set[int],
    samples: int,
    temperature: float,
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """The tokens of `samples` answers to each prompt.

    What an answer draws depends only on the name of its prompt and on its number among the samples. In another batch,
    the rounding of the logits differs, which changes a token if the draw lies just between two tokens.
    """
    asked, mask = read_prompts(model, prompts)
    cache, of_prompt = asked.past_key_values, torch.arange(len(prompts)).repeat_interleave(samples)
    cache.reorder_cache(of_prompt)
    draws = [Random(f"{name} {number}") for name in names for number in range(samples)]

    def choose(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """The first token at which the summed probabilities reach the draw."""
        summed = (logits[:, -1].double() / temperature).softmax(-1).cumsum(-1)
        drawn = torch.tensor([[draws[row].random()] for row in rows], dtype=summed.dtype, device=summed.device)
        return torch.searchsorted(summed, drawn * summed[:, -1:])

    answers: list[list[int]] = [[] for _ in draws]
    logits = asked.logits[of_prompt]
    for row, token in decode(model, logits, mask[of_prompt], cache, ends, max_new_tokens, choose):
        answers[row].append(token)
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]
