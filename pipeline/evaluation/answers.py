"""The answers of a Hugging Face model to an exam."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from pipeline.common.errors import UserError
from pipeline.evaluation.questions import Answer, Question
from pipeline.evaluation.rules import correct
from pipeline.evaluation.tool_calls import as_text, malformed
from pipeline.model.chat_template import DATE, control_tokens, end_tokens, shared_beginning, token_ids
from pipeline.model.responses import Malformed, called, reads_thinking, require_response_template
from pipeline.model.row_kinds import CLOSING, require_carried, thinking_marks
from pipeline.model.supervision import (
    IGNORED,
    content_of,
    decoded,
    opens_thinking,
    supervised,
    thinking_of,
)

WORTH_A_PASS = 8  # tokens

Choice = Callable[[torch.Tensor, list[int]], torch.Tensor]  # (logits, numbers of the rows) -> a token of each row


def prompt(tokenizer: Any, question: Question, date: datetime = DATE) -> list[int]:
    """The token ids of a question as the model's chat template renders it on `date`, ready to be answered."""
    return token_ids(tokenizer, question.asked, add_generation_prompt=True, date=date, tools=question.tools)


def prompts(tokenizer: Any, questions: list[Question]) -> list[list[int]]:
    """`prompt` of each question. Raises UserError, naming the source, if the chat template cannot carry a question."""
    found = []
    for question in questions:
        try:
            require_carried(tokenizer, question.messages, question.tools, question.source)
            if question.tools:
                require_response_template(tokenizer)
            found.append(prompt(tokenizer, question))
        except TemplateError as error:
            raise UserError(f"{question.source}: the base's chat template refuses this conversation: {error}") from None
    return found


def answer_questions(
    model: PreTrainedModel, tokenizer: Any, questions: list[Question], batch_size: int, max_new_tokens: int
) -> list[Answer]:
    """Answer every question greedily, and measure how likely the model finds each reference answer."""
    model.eval()
    ends = end_tokens(model.generation_config)
    rows = [prompt_and_reference(tokenizer, question, ends) for question in questions]
    answers: dict[int, Answer] = {}
    lengths = [[len(row.prompt), len(row.reference)] for row in rows]
    for batch in batches_by_length(lengths, batch_size, "exam"):
        given = answer(model, [rows[i] for i in batch], ends, max_new_tokens)
        for i, (tokens, nll) in zip(batch, given, strict=True):
            if math.isnan(nll):
                raise UserError(f"exam question {questions[i].id}: the model's probabilities are no numbers (NaN)")
            answers[i] = replace(answer_of(tokenizer, questions[i], rows[i].prompt, tokens, ends), nll=nll)
    return [answers[i] for i in range(len(questions))]


def batches_by_length(lengths: list[list[int]], batch_size: int, name: str) -> Iterator[list[int]]:
    """Yield the indices of `lengths` in batches of like length, with a progress bar called `name`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in tqdm(range(0, len(order), batch_size), desc=name, unit="batch", disable=len(order) < 2):
        yield order[start : start + batch_size]


def answer_of(tokenizer: Any, question: Question, prompt: list[int], tokens: list[int], ends: set[int]) -> Answer:
    """An answer by its tokens: the text after the thinking, with the calls of the question's tools by
    pipeline.evaluation.tool_calls; the nll is unknown."""
    thought, ended = thinking_of(tokenizer, prompt, tokens)
    text, stopped = text_of(tokenizer, tokens[thought:], ends)
    if question.tools:
        text = with_calls(tokenizer, question, prompt, tokens, thought, text, stopped)
    return Answer(text, stopped, math.nan, (thought, ended) if thinking_marks(tokenizer) else None)


def text_of(tokenizer: Any, tokens: list[int], ends: set[int]) -> tuple[str, bool]:
    """The text of an answer without its thinking, and whether the answer ended by itself."""
    stopped = tokens[-1:] != [] and tokens[-1] in ends
    return content_of(tokenizer, tokens[:-1] if stopped else tokens, ends), stopped


def with_calls(
    tokenizer: Any, question: Question, prompt: list[int], tokens: list[int], thought: int, text: str, stopped: bool
) -> str:
    """The answer's text with its calls; `text` if the answer calls nothing. The first `thought` tokens are thinking.

    If calls are asked for, an answer that did not end has no readable call.

    Raises:
        UserError: nothing can read the calls of this chat template.
    """
    template = require_response_template(tokenizer)
    written = decoded(tokenizer, tokens if reads_thinking(template) else tokens[thought:])
    try:
        content, calls = called(tokenizer, decoded(tokenizer, prompt), written, question.tools, template)
    except Malformed:
        return malformed(text)
    if not calls:
        return text if stopped or question.rule.kind != "tool_calls" else malformed(text)
    return as_text(control_tokens(tokenizer).sub("", content).strip(), calls)


class Asked(NamedTuple):
    """The token ids of a prompt, and of the reference: the first accepted answer and the token that ends it.

    The first `unscored` tokens of the reference are an empty thinking block, after a prompt that lets the base think.
    """

    prompt: list[int]
    reference: list[int]
    unscored: int = 0


def prompt_and_reference(tokenizer: Any, question: Question, ends: set[int]) -> Asked:
    """Raises UserError if the calls of the reference cannot be read from its tokens."""
    location = f"exam question {question.id}"
    ids, labels = supervised(
        tokenizer, [*question.asked, question.reference], ends, location, mask_history=True, tools=question.tools
    )
    start = next(at for at, label in enumerate(labels) if label != IGNORED)
    asked, answer = prompt(tokenizer, question), [label for label in labels if label != IGNORED]
    if question.tools:
        read = answer_of(tokenizer, question, ids[:start], answer, ends)
        if not correct(read.text, question.answers[:1], question.rule):
            raise UserError(
                f"{location}: its calls, as the base's chat template writes them, read {read.text!r}: reword the "
                "arguments, or set tokenize.tool_format to hermes"
            )
    if ids[: len(asked)] == asked:
        return Asked(asked, ids[len(asked) : start] + answer, start - len(asked))
    closing = tokenizer.encode(CLOSING, add_special_tokens=False) if opens_thinking(tokenizer, asked) else []
    return Asked(asked, closing + answer, len(closing))


@torch.inference_mode()
def answer(
    model: PreTrainedModel, rows: list[Asked], ends: set[int], max_new_tokens: int
) -> list[tuple[list[int], float]]:
    """For each row: the tokens of the greedy answer, and the mean negative log-likelihood of the
    reference in nats per token.

    One forward pass reads the prompts for both. If every token of a reference is the likeliest token, the reference is
    the greedy answer, as a draft is in speculative decoding (https://arxiv.org/abs/2211.17192). Only other answers are
    decoded. In bfloat16, two almost equal tokens may change their order between one pass and decoding token by token.
    """
    asked, mask = read_prompts(model, [row.prompt for row in rows])
    cache = asked.past_key_values
    labels = padded([row.reference for row in rows], "right").to(model.device)
    of_reference, drafts = labels != IGNORED, labels[:, :-1]
    drafted = forward(model, drafts, pad(mask, (0, drafts.shape[1]), value=1), past_key_values=deepcopy(cache))
    logits = torch.cat([asked.logits, drafted.logits], dim=1)
    losses = cross_entropy(logits[of_reference].float(), labels[of_reference], reduction="none")
    by_row = zip(rows, losses.split(of_reference.sum(1).tolist()), strict=True)
    nlls = [of_row[row.unscored :].mean().item() for row, of_row in by_row]

    answers = [row.reference[:max_new_tokens] for row in rows]
    others = ((logits.argmax(-1) != labels) & of_reference).any(1).nonzero().flatten()
    cache.reorder_cache(others)
    for row in others.tolist():
        answers[row] = []
    for i, token in decode(model, asked.logits[others], mask[others], cache, ends, max_new_tokens):
        answers[int(others[i])].append(token)
    return list(zip(answers, nlls, strict=True))


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompts: list[list[int]], ends: set[int], max_new_tokens: int
) -> Iterator[tuple[int, int]]:
    """Yield (number of the prompt, token) of the greedy answers, as the tokens come."""
    asked, mask = read_prompts(model, prompts)
    yield from decode(model, asked.logits, mask, asked.past_key_values, ends, max_new_tokens)


def greedy_in_batches(
    model: PreTrainedModel, prompts: list[list[int]], ends: set[int], batch_size: int, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of the greedy answer to each prompt."""
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in batches_by_length([[len(prompt)] for prompt in prompts], batch_size, "answers"):
        for row, token in greedy(model, [prompts[i] for i in batch], ends, max_new_tokens):
            answers[batch[row]].append(token)
    return answers


def read_prompts(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[Any, torch.Tensor]:
    """The model's output for the last token of each prompt, and the mask of its cache (shape: prompts, tokens).

    What all prompts begin with, such as a system prompt, is read once. The padding then follows this beginning; only a
    cache that keeps every token allows that.
    """
    begin, cache = shared_beginning([prompt[:-1] for prompt in prompts]), None
    if begin >= WORTH_A_PASS and len(prompts) > 1 and keeps_all_tokens(DynamicCache(config=model.config)):
        row = torch.tensor([prompts[0][:begin]], device=model.device)
        cache = forward(model, row, torch.ones_like(row), logits_to_keep=1).past_key_values
        cache = cache if keeps_all_tokens(cache) else None
    if cache is None:
        begin = 0
    else:
        cache.batch_repeat_interleave(len(prompts))
    ids = padded([prompt[begin:] for prompt in prompts], "left").to(model.device)
    mask = pad((ids != IGNORED).long(), (begin, 0), value=1)
    return forward(model, ids, mask, past_key_values=cache, logits_to_keep=1), mask


def keeps_all_tokens(cache: Cache) -> bool:
    """Whether a cache has no windows, and no states that sum tokens up."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def likeliest(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits.argmax(-1)


def decode(
    model: PreTrainedModel,
    logits: torch.Tensor,
    mask: torch.Tensor,
    cache: Cache,
    ends: set[int],
    max_new_tokens: int,
    choose: Choice = likeliest,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) of the answers; `logits` (shape: rows, 1, vocabulary) are those of the first tokens.

    `choose` gives the tokens (shape: rows, 1) of the rows that are left. By default, the answers are greedy.

    A row leaves the batch when its answer ends. Transformers' own `generate` keeps every row until the last one ends.
    """
    rows = list(range(len(mask)))
    for left in reversed(range(max_new_tokens)):
        tokens = choose(logits, rows)
        made = tokens.flatten().tolist()
        yield from zip(rows, made, strict=True)
        going = [i for i, token in enumerate(made) if token not in ends]
        if not (going and left):
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            tokens, mask = tokens[going], mask[going]
            cache.reorder_cache(torch.tensor(going, dtype=torch.long))
        mask = pad(mask, (0, 1), value=1)
        logits = forward(model, tokens, mask, past_key_values=cache).logits


def padded(rows: list[list[int]], side: str) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED, padding_side=side)


def forward(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """The model's output for `ids` (shape: rows, new tokens); `mask` (shape: rows, cached and new tokens)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous)
    try:
        return model(input_ids=ids.clamp(min=0), attention_mask=mask, position_ids=positions, use_cache=True, **options)
    finally:
        hook.remove()


def contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """`logits_to_keep` selects a part of the hidden states. If they have gaps, torch copies the head for each row:
    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/LinearAlgebra.cpp (should_fold)"""
    return (inputs[0].contiguous(),)
