"""Which tokens of a conversation are learnt: the assistant's, each turn's end included."""

from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.model.chat_template import token_ids

IGNORED = -100  # the label that torch's cross entropy leaves out
LEAST = 16  # answer tokens of a truncated row: fewer teach nothing


def supervised(
    tokenizer: Any, messages: list[dict[str, str]], ends: set[int], place: str, mask_history: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and their labels: the ids of the assistant's turns (with `mask_history`, of the last
    alone), each up to and with its first token in `ends`; IGNORED elsewhere.

    Raises:
        UserError: naming `place`, if the template refuses the conversation, doubles the BOS, renders a turn's prompt
            differently once it is answered, ends a turn with none of `ends`, or changes an answer; or if nothing in
            the conversation is learnt.
    """
    try:
        ids = token_ids(tokenizer, messages)
    except TemplateError as error:
        raise UserError(
            f"{place}: the base's chat template refuses this row: {error}: reword it for this base"
        ) from None
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"{place}: the base's chat template begins this row with {tokenizer.bos_token} twice: remove one from the "
            "template in a local copy of the base, or choose another base.model"
        )
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (mask_history and i < len(messages) - 1):
            continue
        prompt = token_ids(tokenizer, messages[:i], add_generation_prompt=True)
        start = len(prompt)
        if ids[:start] != prompt:
            raise UserError(f"{place}: {thinking(message, i) or prompt_differs(messages, i)}")
        end = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
        if end is None:
            raise UserError(
                f"{place}: the base's chat template ends turn {i + 1} with none of the tokens {sorted(ends)} at which "
                "the base stops: correct eos_token_id in its generation_config.json"
            )
        learnt = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if learnt.strip() != message["content"].strip():
            changed = (
                f"the base's chat template turns the answer of turn {i + 1} into {learnt!r}, which the exam would "
                "count as wrong: choose another base.model"
            )
            raise UserError(f"{place}: {thinking(message, i) or changed}")
        labels[start : end + 1] = ids[start : end + 1]
    if all(label == IGNORED for label in labels):
        raise UserError(f"{place}: nothing in this row is learnt: end it with an answer of the assistant, or remove it")
    return ids, labels


def thinking(message: dict[str, str], i: int) -> str:
    """What to say of an answer that thinks, if it does: the template of a thinking model moves or removes that."""
    if "</think>" not in message["content"]:
        return ""
    return f"turn {i + 1} has a <think> block, and this pipeline trains without thinking: remove it from the answer"


def prompt_differs(messages: list[dict[str, str]], i: int) -> str:
    differs = f"the base's chat template renders the prompt of turn {i + 1} differently with its answer"
    if messages[i]["content"][:1].isspace():
        return f"{differs}, which begins with white space: remove that"
    if i < len(messages) - 1:
        return f"{differs} and more turns: split the row, or set tokenize.mask_history: true to learn its last answer alone"
    return f"{differs}: choose another base.model"


def truncated(
    tokenizer: Any,
    messages: list[dict[str, str]],
    ends: set[int],
    place: str,
    max_length: int,
    mask_history: bool = False,
) -> tuple[list[int], list[int]] | None:
    """`supervised` in at most `max_length` tokens, or None if the prompt leaves too few of them to the answer.

    The oldest exchanges go first, a system message stays; then the end of the last answer goes. LEAST tokens of it, or
    all of a shorter one, stay.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(turns) > 2 and len(token_ids(tokenizer, system + turns)) > max_length:
        turns = turns[2:]
    ids, labels = supervised(tokenizer, system + turns, ends, place, mask_history)
    learnt = [at for at, label in enumerate(labels) if label != IGNORED]
    if max_length - learnt[0] < min(LEAST, len(learnt) - 1):
        return None
    return ids[:max_length], labels[:max_length]
