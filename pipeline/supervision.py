"""Which tokens of a conversation are learnt: the assistant's, each turn's end included."""

from typing import Any

from jinja2 import TemplateError

from pipeline.refusal import Refused

IGNORED = -100  # the label that torch's cross entropy leaves out


def supervised(
    tokenizer: Any, messages: list[dict[str, str]], ends: set[int], place: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and their labels: the ids of the assistant's turns, each up to and with its first
    token in `ends`; IGNORED elsewhere.

    Raises:
        Refused: naming `place`, if the template refuses the conversation, renders a turn's prompt differently once it
            is answered, ends a turn with none of `ends`, or adds to an answer (as thinking models' templates do).
    """
    try:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
    except TemplateError as error:
        raise Refused(f"{place}: the base's chat template refuses this row: {error}: reword it for this base") from None
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        start = len(prompt)
        if ids[:start] != prompt:
            raise Refused(
                f"{place}: the base's chat template renders the prompt of turn {i + 1} differently with its answer: "
                "split the row, or choose another base.model"
            )
        end = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
        if end is None:
            raise Refused(
                f"{place}: the base's chat template ends turn {i + 1} with none of the tokens {sorted(ends)} at which "
                "the base stops: correct eos_token_id in its generation_config.json"
            )
        learnt = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if learnt.strip() != message["content"].strip():
            raise Refused(
                f"{place}: the base's chat template turns the answer of turn {i + 1} into {learnt!r}, which the exam "
                "would count as wrong: choose another base.model"
            )
        labels[start : end + 1] = ids[start : end + 1]
    return ids, labels
