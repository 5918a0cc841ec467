"""Chooses the supervised tokens of a conversation: the assistant's turns, each with its end token."""

from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.model.chat_template import token_ids

IGNORED = -100  # the label that torch's cross entropy ignores
LEAST = 16  # minimum answer tokens of a truncated row


def supervised(
    tokenizer: Any, messages: list[dict[str, str]], ends: set[int], location: str, mask_history: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and one label per token.

    The label of a supervised token is its id; all others are IGNORED. Supervised are the assistant's turns (with
    `mask_history`, only the last message), each to its first token in `ends`, inclusive.

    Raises:
        UserError: names `location`. The template refuses the conversation, doubles the BOS, renders the prompt of a
            turn differently with its answer, ends a turn with none of `ends`, or changes an answer; or no token is
            supervised.
    """
    try:
        ids = token_ids(tokenizer, messages)
    except TemplateError as error:
        raise UserError(
            f"{location}: the base's chat template refuses this row: {error}: reword it for this base"
        ) from None
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"{location}: the base's chat template begins this row with {tokenizer.bos_token} twice: remove one from "
            "the template in a local copy of the base, or choose another base.model"
        )
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (mask_history and i < len(messages) - 1):
            continue
        prompt = token_ids(tokenizer, messages[:i], add_generation_prompt=True)
        start = len(prompt)
        if ids[:start] != prompt:
            raise UserError(f"{location}: {thinking(message, i) or prompt_differs(messages, i)}")
        end = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
        if end is None:
            raise UserError(
                f"{location}: the base's chat template ends turn {i + 1} with none of the tokens {sorted(ends)}, at "
                "which the base stops: correct eos_token_id in its generation_config.json"
            )
        answer = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if answer.strip() != message["content"].strip():
            changed = (
                f"the base's chat template turns the answer of turn {i + 1} into {answer!r}, which the exam would "
                "count as wrong: choose another base.model"
            )
            raise UserError(f"{location}: {thinking(message, i) or changed}")
        labels[start : end + 1] = ids[start : end + 1]
    if all(label == IGNORED for label in labels):
        raise UserError(f"{location}: this row has no supervised tokens: end it with an answer, or remove it")
    return ids, labels


def thinking(message: dict[str, str], i: int) -> str:
    """The error for an answer with a <think> block, else "". The template of a thinking model moves such a block."""
    if "</think>" not in message["content"]:
        return ""
    return f"turn {i + 1} has a <think> block, and this pipeline trains without thinking: remove it from the answer"


def prompt_differs(messages: list[dict[str, str]], i: int) -> str:
    differs = f"the base's chat template renders the prompt of turn {i + 1} differently with its answer"
    if messages[i]["content"][:1].isspace():
        return f"{differs}, which begins with white space: remove the white space"
    if i < len(messages) - 1:
        return (
            f"{differs} and more turns: split the row, or set tokenize.mask_history: true to train only on the last "
            "answer"
        )
    return f"{differs}: choose another base.model"


def truncated(
    tokenizer: Any,
    messages: list[dict[str, str]],
    ends: set[int],
    location: str,
    max_length: int,
    mask_history: bool = False,
) -> tuple[list[int], list[int]] | None:
    """`supervised`, with a maximum of `max_length` tokens; None if too few tokens remain for the answer.

    The oldest exchanges are removed first (not the system message), then the end of the last answer. At least LEAST
    tokens of the answer remain, or all of a shorter answer.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(turns) > 2 and len(token_ids(tokenizer, system + turns)) > max_length:
        turns = turns[2:]
    ids, labels = supervised(tokenizer, system + turns, ends, location, mask_history)
    trained_on = [at for at, label in enumerate(labels) if label != IGNORED]
    if max_length - trained_on[0] < min(LEAST, len(trained_on) - 1):
        return None
    return ids[:max_length], labels[:max_length]
