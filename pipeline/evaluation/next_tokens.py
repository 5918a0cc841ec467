"""How a model continues the exam's reference answers: its next-token distribution at each of their tokens.

Every variant of the model tells it at the same places, so that any two can be held against each other.
"""

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.conversions import NextToken
from pipeline.model.llama_server import Server

N_PROBS = 128  # likeliest tokens that are told of each distribution


@torch.inference_mode()
def in_transformers(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[NextToken]:
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0]
    logprobs, tokens = logits.float().log_softmax(-1).topk(min(N_PROBS, logits.shape[1]))
    told = [dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]
    return [NextToken(*each) for each in zip(answer, told, strict=True)]


def in_llama_cpp(server: Server, prompt: list[int], answer: list[int]) -> list[NextToken]:
    """The last token of `answer` is one at which the file stops."""
    *_, end = answer
    return [NextToken(token, server.likeliest(prompt + answer[:i], N_PROBS, end)) for i, token in enumerate(answer)]
