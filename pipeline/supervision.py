"""Which tokens of a conversation are learnt: the assistant's, each turn's end included."""

from typing import Any

from pipeline.refusal import Refused

IGNORED = -100  # the label that torch's cross entropy leaves out


def supervised(
    tokenizer: Any, messages: list[dict[str, str]], ends: set[int], place: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and their labels: the ids of the assistant's turns, each up to and with its first
    token in `ends`; IGNORED elsewhere.

    Raises:
        Refused: naming `place`, if the template renders a turn's prompt differently once it is answered, or ends a turn
            with none of `ends`.
    """
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        start = len(prompt)
        if ids[:start] != prompt:
            raise Refused(f"{place}: the chat template renders the prompt of turn {i + 1} differently with its answer")
        end = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
        if end is None:
            raise Refused(
                f"{place}: the chat template ends turn {i + 1} with none of the base's end tokens {sorted(ends)}"
            )
        labels[start : end + 1] = ids[start : end + 1]
    return ids, labels
