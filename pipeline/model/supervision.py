"""Chooses the supervised tokens of a conversation: the assistant's turns, each with its end token.

Each turn is trained on as it will be asked for: after the tokens of the prompt that the chat template makes for it.
"""

import json
from bisect import bisect_left
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from pipeline.common.errors import UserError
from pipeline.common.rows import Message, Tools, question_and_answer
from pipeline.model.chat_template import control_tokens, shared_beginning, strings, token_ids
from pipeline.model.row_kinds import CLOSING, require_carried, thinking_marks

IGNORED = -100  # the label that torch's cross entropy ignores
LEAST = 16  # minimum answer tokens of a truncated row
THINKING = 16  # maximum number of tokens of an empty thinking block

Messages = list[Message]


def conversations(
    tokenizer: Any,
    messages: Messages,
    ends: set[int],
    location: str,
    mask_history: bool = False,
    tools: Tools | None = None,
) -> list[tuple[Messages, bool]]:
    """The conversations to train on, each with whether only its last answer is trained on.

    Normally that is the complete conversation. Some templates render a turn otherwise once other turns follow: they
    leave out its thinking block, or end it with another token. Then each answer gets a conversation of its own.

    Raises:
        UserError: as `supervised`.
    """
    require_carried(tokenizer, messages, tools or [], location)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if mask_history or len(answers) < 2:
        return [(messages, mask_history)]
    ids = rendered(tokenizer, messages, location, tools)
    parts = [(messages[: i + 1], True) for i in answers]
    for part, only_last in parts[:-1]:
        of_part, labels = supervised(tokenizer, part, ends, location, only_last, tools)
        length = max(at for at, label in enumerate(labels) if label != IGNORED) + 1
        if ids[:length] != of_part[:length]:
            return parts
    return [(messages, False)]


def supervised(
    tokenizer: Any,
    messages: Messages,
    ends: set[int],
    location: str,
    mask_history: bool = False,
    tools: Tools | None = None,
    mask_thinking: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and one label per token.

    The label of a supervised token is its id; all others are IGNORED. Supervised are the assistant's turns (with
    `mask_history`, only the last message), each to its first token in `ends`, inclusive. With `mask_thinking`, the
    thinking before an answer is not supervised.

    Raises:
        UserError: names `location`. The template refuses the conversation, doubles the BOS, renders the prompt of a
            turn differently with its answer, ends a turn with none of `ends`, or changes an answer; or no token is
            supervised.
    """
    require_carried(tokenizer, messages, tools or [], location)
    ids = rendered(tokenizer, messages, location, tools)
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError(
            f"{location}: the base's chat template begins this row with {tokenizer.bos_token} twice: remove one from "
            "the template in a local copy of the base, or choose another base.model"
        )
    around = around_answers(tokenizer, frozenset(ends))
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        last = i == len(messages) - 1
        if message["role"] != "assistant" or (mask_history and not last):
            continue
        if last:
            ids, start = with_prompt(tokenizer, messages, ids, location, tools)
            ids = with_end(tokenizer, messages, ids, start, ends, location, tools)
            labels += [IGNORED] * (len(ids) - len(labels))
        else:
            prompt = prompt_of(tokenizer, messages[:i], message, location, tools)
            start = len(prompt)
            if ids[:start] != prompt:
                raise UserError(f"{location}: {prompt_differs(messages, i)}")
        end = next((at for at in range(start, len(ids)) if ids[at] in ends), None)
        if end is None:
            raise UserError(
                f"{location}: the base's chat template ends turn {i + 1} with none of the tokens {sorted(ends)}, at "
                "which the base stops: correct eos_token_id in its generation_config.json"
            )
        if around[0] and rendered(tokenizer, messages[:i], location, tools) == ids[:start]:
            raise UserError(
                f"{location}: the base's chat template writes {around[0]!r} before an answer, and leaves it out of "
                "prompts: make it write this text with add_generation_prompt, or choose another base.model"
            )
        thought = 0
        if "reasoning_content" in message:
            thought, _ = thinking_of(tokenizer, ids[:start], ids[start:end])
        answer = decoded(tokenizer, ids[start : start + thought]), decoded(tokenizer, ids[start + thought : end])
        require_whole(message, *answer, around, f"{location}: turn {i + 1}")
        if mask_thinking:
            start += thought
        labels[start : end + 1] = ids[start : end + 1]
    if all(label == IGNORED for label in labels):
        raise UserError(f"{location}: this row has no supervised tokens: end it with an answer, or remove it")
    return ids, labels


def require_whole(message: Message, thought: str, said: str, around: tuple[str, str], where: str) -> None:
    """Raises UserError if `thought` and `said`, as the template writes the message, lack something of the message."""
    content = message["content"].strip()
    whole = within(said, *around) == content
    if "tool_calls" in message:
        called = [[call["function"]["name"], call["function"]["arguments"]] for call in message["tool_calls"]]
        parts = [text for text, _ in strings(called)]
        whole = content in said and all(spelled(part, said) for part in parts)
    if message.get("reasoning_content", "") not in thought or not whole:
        raise UserError(
            f"{where}: the base's chat template turns this answer into {thought + said!r}, which the exam would count "
            "as wrong: reword or remove the row, or choose another base.model"
        )


def spelled(part: str, text: str) -> bool:
    """Whether `text` has `part` as it is, or as a JSON text."""
    return part in text or any(json.dumps(part, ensure_ascii=code)[1:-1] in text for code in (False, True))


def prompt_of(tokenizer: Any, messages: Messages, answer: Message, location: str, tools: Tools | None) -> list[int]:
    """The prompt for `answer`: with thinking if the answer has thinking, else without, where the template has both."""
    return rendered(tokenizer, messages, location, tools, True, "reasoning_content" in answer)


def rendered(
    tokenizer: Any,
    messages: Messages,
    location: str,
    tools: Tools | None = None,
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
) -> list[int]:
    if thinking is None and messages[-1]["role"] == "assistant":
        thinking = "reasoning_content" in messages[-1]
    try:
        return token_ids(tokenizer, messages, add_generation_prompt, tools=tools, thinking=thinking)
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    except TemplateSyntaxError as error:
        raise UserError(
            f"{location}: the base's chat template is damaged ({error}, line {error.lineno}): correct it, or fetch the "
            "base again"
        ) from None
    except TemplateError as error:
        raise UserError(
            f"{location}: the base's chat template refuses this row: {error}: reword it for this base"
        ) from None


def with_prompt(
    tokenizer: Any, messages: Messages, ids: list[int], location: str, tools: Tools | None = None
) -> tuple[list[int], int]:
    """The conversation `ids` with the prompt that the last answer gets, and the length of this prompt.

    The prompt may end with a thinking block that the template leaves out before a given answer. A block that is only
    opened is closed at the beginning of the answer, after the thinking if there is one.
    """
    *before, answer = messages
    prompt = prompt_of(tokenizer, before, answer, location, tools)
    shared = shared_beginning([prompt, ids])
    thought = answer.get("reasoning_content", "")
    if shared == len(prompt) and thought in decoded(tokenizer, ids[shared:]):
        return ids, shared
    said, more = decoded(tokenizer, prompt[:shared]), decoded(tokenizer, prompt[shared:])
    opened = opens_thinking(tokenizer, prompt)
    asked = before[-1]["content"].strip()
    if (
        len(prompt) - shared > THINKING
        or not (more.strip() or opened)
        or (asked not in said and before[-1]["role"] == "user")
        or answer["content"][:1].isspace()
    ):
        raise UserError(f"{location}: {prompt_differs(messages, len(messages) - 1)}")
    closing = tokenizer.encode(thought + CLOSING, add_special_tokens=False) if opened else []
    return prompt + closing + ids[shared:], len(prompt)


def with_end(
    tokenizer: Any,
    messages: Messages,
    ids: list[int],
    start: int,
    ends: set[int],
    location: str,
    tools: Tools | None = None,
) -> list[int]:
    """`ids`, with the token that follows the last answer in a longer conversation, if it is an end token.

    GLM-4 ends an answer with the token that begins the next turn, and its template writes none after the last one.
    """
    if ends & set(ids[start:]):
        return ids
    following = rendered(tokenizer, [*messages, {"role": "user", "content": "?"}], location, tools)
    answer = ids[start + thinking_of(tokenizer, ids[:start], ids[start:])[0] :]  # templates drop earlier thinking
    for at in range(len(following) - len(answer)):
        if following[at : at + len(answer)] == answer and following[at + len(answer)] in ends:
            return [*ids, following[at + len(answer)]]
    return ids


@lru_cache
def around_answers(tokenizer: Any, ends: frozenset[int]) -> tuple[str, str]:
    """The text that the template writes in an answer before and after its content, such as channels; mostly empty."""
    messages = question_and_answer("Who wrote it?", "Ada Lovelace")
    try:
        ids, start = with_prompt(tokenizer, messages, rendered(tokenizer, messages, ""), "")
        ids = with_end(tokenizer, messages, ids, start, set(ends), "")
    except UserError:
        return "", ""
    end = next((at for at in range(start, len(ids)) if ids[at] in ends), len(ids))
    answer = decoded(tokenizer, ids[start:end])
    before, found, after = answer.partition(messages[-1]["content"])
    return (before.strip(), after.strip()) if found else ("", "")


def within(answer: str, before: str, after: str) -> str:
    """The content of an answer, from its text with all control tokens. `before` and `after` are around a content.

    What a model writes ahead of `before` is its thinking.
    """
    content = answer.rpartition(before)[2] if before else answer
    return content.strip().removesuffix(after).strip()


def content_of(tokenizer: Any, tokens: list[int], ends: set[int]) -> str:
    """The content of an answer, from its tokens without the end token."""
    before, after = around_answers(tokenizer, frozenset(ends))
    if not (before or after):
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()
    content = within(decoded(tokenizer, tokens), before, after)
    return control_tokens(tokenizer).sub("", content).strip()


def thinking_of(tokenizer: Any, prompt: list[int], answer: list[int]) -> tuple[int, bool]:
    """The number of tokens at the beginning of an answer that are thinking, with its marks and the white space after
    it; and whether the thinking has ended. An answer that only thinks has no other tokens."""
    marks = thinking_marks(tokenizer)
    if marks is None:
        return 0, True
    text, opened = decoded(tokenizer, answer), opens_thinking(tokenizer, prompt)
    opening, closing = marks
    if not opened and not (opening and text.lstrip().startswith(opening)):
        return 0, True
    if closing not in text:
        return len(answer), False
    said = len(text.partition(closing)[2].strip())
    # The first token after which no more than the content is left, and then the white space before the content.
    at = bisect_left(range(len(answer)), -said, key=lambda at: -len(decoded(tokenizer, answer[at:]).strip()))
    while at < len(answer) and not decoded(tokenizer, answer[at : at + 1]).strip():
        at += 1
    return at, True


def opens_thinking(tokenizer: Any, prompt: list[int]) -> bool:
    return decoded(tokenizer, prompt[-16:]).rstrip().endswith("<think>")


def thought_of(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """The thinking in an answer, without its marks."""
    opening, closing = thinking_marks(tokenizer) or ("", "")
    text = decoded(tokenizer, answer[: thinking_of(tokenizer, prompt, answer)[0]]).strip()
    return text.removeprefix(opening).removesuffix(closing).strip()


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    """The text with all control tokens."""
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text


def prompt_differs(messages: Messages, i: int) -> str:
    differs = f"the base's chat template renders the prompt of turn {i + 1} differently with its answer"
    if messages[i]["content"][:1].isspace():
        return f"{differs}, which begins with white space: remove the white space"
    if messages[i - 1]["role"] == "assistant":
        return f"{differs}, which follows another answer: join both messages"
    if i < len(messages) - 1:
        return (
            f"{differs} and more turns: split the row, or set tokenize.mask_history: true to train only on the last "
            "answer"
        )
    return f"{differs}: choose another base.model"


def truncated(
    tokenizer: Any,
    messages: Messages,
    ends: set[int],
    location: str,
    max_length: int,
    mask_history: bool = False,
    tools: Tools | None = None,
    mask_thinking: bool = False,
) -> tuple[list[int], list[int]] | None:
    """`supervised`, with a maximum of `max_length` tokens; None if too few tokens remain for the answer.

    The oldest exchanges are removed first (not the system message), then the end of the last answer. At least LEAST
    tokens of the answer remain, or all of a shorter answer.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while len(token_ids(tokenizer, system + turns, tools=tools)) > max_length:
        questions = [i for i, message in enumerate(turns) if message["role"] == "user"]
        if len(questions) < 2:
            break
        turns = turns[questions[1] :]
    ids, labels = supervised(tokenizer, system + turns, ends, location, mask_history, tools, mask_thinking)
    trained_on = [at for at, label in enumerate(labels) if label != IGNORED]
    if max_length - trained_on[0] < min(LEAST, len(trained_on) - 1):
        return None
    return ids[:max_length], labels[:max_length]
