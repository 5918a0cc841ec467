"""The next-token distributions of a model at each token of the exam's reference answers.

Every variant of the model gives the distributions at the same tokens, so that any two variants can be compared.
"""

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.conversions import NextToken
from pipeline.model.llama_server import Server

N_PROBS = 128  # likeliest tokens that are kept of each distribution


@torch.inference_mode()
def in_transformers(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[NextToken]:
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(answer)).logits[0]
    logprobs, tokens = logits.float().log_softmax(-1).topk(min(N_PROBS, logits.shape[1]))
    likeliest = [dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]
    return [NextToken(*each) for each in zip(answer, likeliest, strict=True)]


def in_llama_cpp(server: Server, prompt: list[int], answer: list[int]) -> list[NextToken]:
    """`answer` ends with a token at which the file stops."""
    *_, end = answer
    return [NextToken(token, server.likeliest(prompt + answer[:i], N_PROBS, end)) for i, token in enumerate(answer)]
