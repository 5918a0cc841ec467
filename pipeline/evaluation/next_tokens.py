"""The next-token distributions of a model at each token of the exam's reference answers.

Every variant of the model gives the distributions at the same tokens, so that any two variants can be compared.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.evaluation.answers import batches_by_length, forward, padded
from pipeline.evaluation.conversions import NextToken
from pipeline.model.llama_server import Server
from pipeline.model.supervision import IGNORED

N_PROBS = 128  # likeliest tokens that are kept of each distribution


@torch.inference_mode()
def in_transformers(
    model: PreTrainedModel, asked: list[tuple[list[int], list[int]]], batch_size: int
) -> list[list[NextToken]]:
    """For each (prompt, reference answer): the distribution at each token of the answer."""
    model.eval()
    found: dict[int, list[NextToken]] = {}
    lengths = [[len(answer), len(prompt)] for prompt, answer in asked]
    for batch in batches_by_length(lengths, batch_size, "next tokens"):
        ids = padded([asked[i][0] + asked[i][1][:-1] for i in batch], "left").to(model.device)
        longest = max(len(asked[i][1]) for i in batch)
        logits = forward(model, ids, (ids != IGNORED).long(), logits_to_keep=longest).logits
        for i, of_row in zip(batch, logits, strict=True):
            answer = asked[i][1]
            logprobs, tokens = of_row[-len(answer) :].float().log_softmax(-1).topk(min(N_PROBS, logits.shape[-1]))
            likeliest = [dict(zip(*row, strict=True)) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]
            found[i] = [NextToken(*each) for each in zip(answer, likeliest, strict=True)]
    return [found[i] for i in range(len(asked))]


def in_llama_cpp(
    server: Server, prompt: list[int], answer: list[int], reply: dict[str, Any] | None = None
) -> list[NextToken]:
    """The distribution at each token of `answer`, which ends with a token at which the file stops.

    `reply` is the server's own answer to the prompt, with N_PROBS probabilities. The server is not asked again where
    both answers have begun with the same tokens.
    """
    *_, end = answer
    own, given = (reply["tokens"], server.likeliest_of(reply)) if reply else ([], [])

    def likeliest(i: int) -> dict[int, float]:
        known = i < len(given) and own[:i] == answer[:i]
        return given[i] if known else server.likeliest(prompt + answer[:i], N_PROBS, end)

    return [NextToken(token, likeliest(i)) for i, token in enumerate(answer)]
