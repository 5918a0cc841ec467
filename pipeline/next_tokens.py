"""How a model continues the exam's reference answers: its next-token distribution at every token of theirs.

Every form of the model tells it at the same places, so that any two can be held against each other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.answers import prompt_and_reference
from pipeline.exam import Question
from pipeline.hops import NextToken
from pipeline.llama_cpp import Server
from pipeline.refusal import Refused

N_PROBS = 128  # likeliest tokens that are told of each distribution


@dataclass(frozen=True)
class Reference:
    prompt: list[int]
    answer: list[int]  # the last token ends it
    places: list[int]  # in the answer


def reference(tokenizer: Any, question: Question, ends: set[int]) -> Reference:
    """The first accepted answer. llama.cpp tells nothing of a token that ends in the middle of a character, so neither
    does Transformers."""
    prompt, answer = prompt_and_reference(tokenizer, question, ends)
    places = [at for at in range(len(answer)) if not tokenizer.decode(answer[: at + 1]).endswith("\ufffd")]
    return Reference(prompt, answer, places)


@torch.inference_mode()
def in_transformers(model: PreTrainedModel, asked: Reference) -> list[NextToken]:
    ids = torch.tensor([asked.prompt + asked.answer[:-1]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(asked.answer)).logits[0]
    logprobs = logits.float().log_softmax(-1).cpu()[asked.places]
    nlls = -logprobs.gather(1, torch.tensor(asked.answer)[asked.places, None]).flatten()
    values, tokens = (part.tolist() for part in logprobs.topk(min(N_PROBS, logprobs.shape[1])))
    return [NextToken(*told) for told in zip(nlls.tolist(), map(dict, map(zip, tokens, values)), strict=True)]


def in_llama_cpp(server: Server, asked: Reference) -> list[NextToken]:
    """Raises Refused if llama.cpp does not give the answer token by token."""
    reply = server.force(asked.prompt, asked.answer, N_PROBS)
    told, expected = reply["completion_probabilities"], [asked.answer[at] for at in asked.places]
    if reply["tokens"] != asked.answer or [token["id"] for token in told] != expected:
        raise Refused(f"llama.cpp gives {reply['tokens']} where the reference answer is {asked.answer}")
    return [NextToken(-at["logprob"], {token["id"]: token["logprob"] for token in at["top_logprobs"]}) for at in told]
