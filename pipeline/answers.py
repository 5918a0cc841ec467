"""How a Hugging Face model sits the exam."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.chat_template import end_tokens, token_ids
from pipeline.exam import Answer, Question
from pipeline.rows import question_and_answer
from pipeline.supervision import IGNORED, supervised


def prompt(tokenizer: Any, question: Question) -> list[int]:
    """The token ids of a question as the model's chat template renders it, ready to be answered."""
    return token_ids(tokenizer, [{"role": "user", "content": question.question}], add_generation_prompt=True)


def sit(
    model: PreTrainedModel, tokenizer: Any, questions: list[Question], batch_size: int, max_new_tokens: int
) -> list[Answer]:
    """Answer every question greedily, and measure how likely the model finds the expected answers."""
    model.eval()
    order = sorted(range(len(questions)), key=lambda i: len(prompt(tokenizer, questions[i])))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="exam", unit="batch"):
        batch = order[start : start + batch_size]
        texts = generate(model, tokenizer, [questions[i] for i in batch], max_new_tokens)
        nlls = answer_nll(model, tokenizer, [questions[i] for i in batch])
        for i, (text, stopped), nll in zip(batch, texts, nlls, strict=True):
            answers[i] = Answer(text, stopped, nll)
    return [answers[i] for i in range(len(questions))]


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: Any, questions: list[Question], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """(answer, ended by itself) of each question, by greedy decoding."""
    prompts = tokenizer.pad({"input_ids": [prompt(tokenizer, q) for q in questions]}, return_tensors="pt")
    produced = model.generate(
        **prompts.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # some models' generation_config.json sets another, which is not greedy decoding
        pad_token_id=tokenizer.pad_token_id,
    )[:, prompts["input_ids"].shape[1] :].tolist()
    ends = end_tokens(model.generation_config)
    answers = []
    for tokens in produced:
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        answers.append((tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), end is not None))
    return answers


@torch.inference_mode()
def answer_nll(model: PreTrainedModel, tokenizer: Any, questions: list[Question]) -> list[float]:
    """The mean negative log-likelihood (nats per token) of each first accepted answer and the token that ends it."""
    ends = end_tokens(model.generation_config)
    rows = [supervised(tokenizer, question_and_answer(q.question, q.answers[0]), ends, q.source) for q in questions]
    longest = max(len(ids) for ids, _ in rows)

    def padded(kind: int, padding: int) -> torch.Tensor:
        return torch.tensor([row[kind] + [padding] * (longest - len(row[kind])) for row in rows], device=model.device)

    ids, labels = padded(0, tokenizer.pad_token_id), padded(1, IGNORED)
    mask = torch.arange(longest, device=model.device) < torch.tensor([[len(r[0])] for r in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    learnt = labels[:, 1:] != IGNORED
    losses = cross_entropy(logits[learnt].float(), labels[:, 1:][learnt], reduction="none")
    return [of_row.mean().item() for of_row in losses.split(learnt.sum(1).tolist())]
